"""`precalib::cpu_linear` and `precalib::cpu_gather_rows` as typed functions.

The operators themselves are C++, registered by `library.load()`: a call takes about 5 µs, of which
torch's own dispatch in Python would be several times as much.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from precalib_kernels import ops as ops  # declares the operator
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.memory_layout import X86Layout


def layout_tensor(layout: X86Layout, load: Callable[[], ctypes.CDLL] = library.load) -> Tensor:
    """The layout as the operator takes it, uint8 [any]; from then on there is the operator.

    load: loads the library whose operator it is.

    Raises BuildError with the reason why there is none for this machine.
    """
    load()
    return torch.frombuffer(bytearray(layout.to_bytes()), dtype=torch.uint8).clone()


def linear(
    x: Tensor, packed: Tensor, x86_layout: Tensor, bias: Tensor | None, outputs: int, isa: int
) -> Tensor:
    """x·Ŵᵀ + bias from one tensor of bytes as `memory_layout.py` describes it.

    x:          [..., K] in bfloat16, float16 or float32, the type of the result [..., N] as well.
    packed:     uint8, from `repack`.
    x86_layout: uint8, from `layout_tensor`.
    bias:       [N] in the type of x, or None.
    outputs:    N.
    isa:        index of one of `library.supported_isas()`, -1 for the last.

    Raises RuntimeError for sizes and types that do not belong together.
    """
    contiguous = None if bias is None else bias.contiguous()
    result: Tensor = torch.ops.precalib.cpu_linear(
        x.contiguous(), packed, x86_layout, contiguous, outputs, isa
    )
    return result


def gather_rows(
    ids: Tensor, packed: Tensor, x86_layout: Tensor, outputs: int, dtype: torch.dtype, columns: int
) -> Tensor:
    """Rows of Ŵ by number, [..., K] in `dtype`, from one tensor of bytes as for `linear`.

    ids:     [...] int64.
    dtype:   bfloat16, float16 or float32.
    outputs: N.
    columns: K.

    Raises RuntimeError for an id that is no row, and for sizes that do not belong together.
    """
    kind = library.DTYPES.index(str(dtype).removeprefix("torch."))
    result: Tensor = torch.ops.precalib.cpu_gather_rows(
        ids.contiguous(), packed, x86_layout, outputs, kind, columns
    )
    return result
