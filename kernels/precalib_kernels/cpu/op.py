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


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, part_sizes: list[int], layout: str, level: str
) -> Tensor:
    """x·Ŵᵀ + bias from the packed form of `plan.py`.

    x:     [..., K] in bfloat16, float16 or float32, which is also the type of the result [..., N].
    bias:  [N] in the type of x, or None.
    level: one of `library.machine_levels`.

    Raises FormatError for sizes that do not belong together.
    """
    plan = _checked_plan(x, packed, bias, part_sizes, layout)
    if level not in library.machine_levels():
        raise FormatError(f"this machine has no {level}")
    x, packed = x.contiguous(), packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], sum(part_sizes)))
    library.load().precalib_linear(
        plan.address,
        library.LEVELS.index(level),
        packed.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // plan.columns,
        TYPES[x.dtype],
    )
    return y


def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, part_sizes: list[int], layout: str, _level: str
) -> Tensor:
    _checked_plan(x, packed, bias, part_sizes, layout)
    return x.new_empty((*x.shape[:-1], sum(part_sizes)))


def _checked_plan(
    x: Tensor, packed: Tensor, bias: Tensor | None, part_sizes: list[int], layout: str
) -> Plan:
    plan = _plan(layout, int(x.shape[-1]), tuple(part_sizes))
    if x.dtype not in TYPES:
        raise FormatError(f"x is {x.dtype}, expected one of {', '.join(map(str, TYPES))}")
    if packed.dtype != torch.uint8 or packed.numel() != plan.nbytes:
        raise FormatError(
            f"the packed weight is {packed.numel()} of {packed.dtype}, "
            f"expected {plan.nbytes} of torch.uint8"
        )
    if bias is not None and (bias.shape != (sum(part_sizes),) or bias.dtype != x.dtype):
        raise FormatError(
            f"bias is {list(bias.shape)} {bias.dtype}, expected [{sum(part_sizes)}] {x.dtype}"
        )
    return plan


@functools.lru_cache(maxsize=1024)
def _plan(layout: str, columns: int, part_sizes: tuple[int, ...]) -> Plan:
    return Plan(Layout.from_text(layout), columns, part_sizes)


_LIBRARY.impl("cpu_linear", linear, "CPU")
torch.library.register_fake("precalib::cpu_linear", _fake, lib=_LIBRARY)
