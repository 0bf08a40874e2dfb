"""`precalib::cpu_linear`: the product by the compiled kernels, see `torch_binding.cpp`."""

import torch
from torch import Tensor

from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.memory_layout import X86Layout

_LIBRARY = torch.library.Library("precalib", "FRAGMENT")
_LIBRARY.define(
    "cpu_linear(Tensor x, Tensor packed, Tensor plan, Tensor? bias, int outputs, int level)"
    " -> Tensor"
)


def plan_tensor(plan: X86Layout) -> Tensor:
    """The plan as the operator takes it, uint8 [any]; from then on there is the operator.

    Raises BuildError with the reason why there is none for this machine.
    """
    library.load()
    return torch.frombuffer(bytearray(plan.to_bytes()), dtype=torch.uint8).clone()


def linear(
    x: Tensor, packed: Tensor, plan: Tensor, bias: Tensor | None, outputs: int, level: int
) -> Tensor:
    """x·Ŵᵀ + bias from the packed form of `memory_layout.py`.

    x:       [..., K] in bfloat16, float16 or float32, the type of the result [..., N] as well.
    packed:  uint8, from `pack`.
    plan:    uint8, from `plan_tensor`.
    bias:    [N] in the type of x, or None.
    outputs: N.
    level:   index of one of `library.supported_isas`, -1 for the last.

    Raises RuntimeError for sizes and types that do not belong together.
    """
    contiguous = None if bias is None else bias.contiguous()
    result: Tensor = torch.ops.precalib.cpu_linear(
        x.contiguous(), packed, plan, contiguous, outputs, level
    )
    return result


def _fake(
    x: Tensor, packed: Tensor, plan: Tensor, bias: Tensor | None, outputs: int, level: int
) -> Tensor:
    del packed, plan, bias, level
    return x.new_empty((*x.shape[:-1], outputs))


torch.library.register_fake("precalib::cpu_linear", _fake, lib=_LIBRARY)
