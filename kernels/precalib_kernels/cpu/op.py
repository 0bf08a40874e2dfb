"""`precalib::cpu_linear`: the product by the compiled kernels, as an operator of torch."""

import functools

import torch
from torch import Tensor

from precalib_kernels.cpu import library
from precalib_kernels.cpu.plan import Plan
from precalib_kernels.errors import FormatError
from precalib_kernels.layout import Layout

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LIBRARY = torch.library.Library("precalib", "FRAGMENT")
_LIBRARY.define(
    "cpu_linear(Tensor x, Tensor packed, Tensor? bias, int[] part_sizes, str layout, str level)"
    " -> Tensor"
)


class Product:
    """x·Ŵᵀ + bias for packed forms of one kind; all that does not depend on x is done once.

    Raises FormatError for a level that this machine does not have.
    """

    def __init__(self, layout: str, columns: int, part_sizes: tuple[int, ...], level: str) -> None:
        if level not in library.machine_levels():
            raise FormatError(f"this machine has no {level}")
        self.plan = Plan(Layout.from_text(layout), columns, part_sizes)
        self.outputs = sum(part_sizes)
        self._nbytes = self.plan.nbytes
        self._address = self.plan.address
        self._level = library.LEVELS.index(level)
        self._run = library.load().precalib_linear

    def check(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
        """Raise FormatError for sizes and types that do not belong together."""
        if x.dtype not in TYPES:
            raise FormatError(f"x is {x.dtype}, expected one of {', '.join(map(str, TYPES))}")
        if x.shape[-1] != self.plan.columns:
            raise FormatError(f"x has {x.shape[-1]} columns, expected {self.plan.columns}")
        if packed.dtype != torch.uint8 or packed.numel() != self._nbytes:
            raise FormatError(
                f"the packed weight is {packed.numel()} of {packed.dtype}, "
                f"expected {self._nbytes} of torch.uint8"
            )
        if bias is not None and (bias.shape != (self.outputs,) or bias.dtype != x.dtype):
            raise FormatError(
                f"bias is {list(bias.shape)} {bias.dtype}, expected [{self.outputs}] {x.dtype}"
            )

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """As `linear`."""
        self.check(x, packed, bias)
        x, packed = x.contiguous(), packed.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = x.new_empty((*x.shape[:-1], self.outputs))
        self._run(
            self._address,
            self._level,
            packed.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // self.plan.columns,
            TYPES[x.dtype],
        )
        return y


product = functools.lru_cache(maxsize=1024)(Product)


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, part_sizes: list[int], layout: str, level: str
) -> Tensor:
    """x·Ŵᵀ + bias from the packed form of `plan.py`.

    x:     [..., K] in bfloat16, float16 or float32, which is also the type of the result [..., N].
    bias:  [N] in the type of x, or None.
    level: one of `library.machine_levels`.

    Raises FormatError for sizes that do not belong together.
    """
    return product(layout, int(x.shape[-1]), tuple(part_sizes), level)(x, packed, bias)


def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, part_sizes: list[int], layout: str, level: str
) -> Tensor:
    product(layout, int(x.shape[-1]), tuple(part_sizes), level).check(x, packed, bias)
    return x.new_empty((*x.shape[:-1], sum(part_sizes)))


_LIBRARY.impl("cpu_linear", linear, "CPU")
torch.library.register_fake("precalib::cpu_linear", _fake, lib=_LIBRARY)
