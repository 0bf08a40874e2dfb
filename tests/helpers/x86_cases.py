"""Packed weights of every layout, and what a product with one of them may be off by."""

import dataclasses
import math

import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.x86 import library, op
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.backends.x86.repack import repack
from precalib_kernels.format.layout import Layout

PLAIN_CODEBOOK = (-128, -90, -50, -20, 0, 25, 60, 127)
LAYOUTS = {
    **RECIPE_LAYOUTS,
    "two bits": Layout(bits=2, group_size=32),
    "two bits, trellis": Layout(
        bits=2,
        group_size=64,
        codebook=PLAIN_CODEBOOK,
        trellis=True,
        scale="log8",
        salient_count=1,
        salient_bits=5,
        salient_grid="row",
    ),
    "three bits, table": Layout(bits=3, group_size=96, codebook=PLAIN_CODEBOOK, column_scale=True),
    "five bits, uniform": Layout(bits=5, group_size=64, scale="log8", salient_count=3),
    "signs": Layout(bits=4, group_size=64, salient_count=32, salient_bits=8, column_scale=True),
    "far positions": Layout(bits=3, group_size=544, salient_count=5, salient_grid="min-max"),
}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STEPS = {  # of splits of x, up to the largest value
    "int8x1": 127,
    "int8x2": 127 * 257 - 1,
    "int8x3": 127 * 65793 - 2,
    "int16x1": 32766,
    "int16x2": 32767 * 65537 - 895,
}


@dataclasses.dataclass
class Case:
    """A packed weight of fused shards, with what it stands for."""

    layout: Layout
    columns: int
    shards: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    base: torch.Tensor  # without column scale, float64
    scale: torch.Tensor  # of the columns, a row per output, float64
    int8_inputs: bool = False
    made: dict[X86Layout, torch.Tensor] = dataclasses.field(init=False, default_factory=dict)

    def memory(self, isa):
        nibbles = library.takes_nibbles(isa)
        return X86Layout(self.layout, self.columns, self.shards, self.int8_inputs, nibbles)

    def packed(self, isa):
        memory = self.memory(isa)
        if memory not in self.made:
            self.made[memory] = repack(self.tensors, memory, "here")
        return self.made[memory]

    def linear(self, x, isa, bias=None):
        return op.linear(x, *self.arguments(isa, bias))

    def arguments(self, isa, bias=None):
        layout = op.layout_tensor(self.memory(isa))
        number = library.supported_isas().index(isa)
        return self.packed(isa), layout, bias, sum(self.shards), number

    def kernel(self, isa, dtype, m):
        """The kernel that the library reports for a product."""
        (name,) = {
            entry.kernel
            for entry in library.kernel_table(self.memory(isa))
            if (entry.isa, f"torch.{entry.dtype}") == (isa, str(dtype))
            and entry.first_m <= m <= (entry.last_m or m)
        }
        return name


def error_bound(case, x, expected, kernel):
    """What a product by `kernel` may be off by, per element.

    Rounding the result; four standard deviations of the rounding of K products and their sums in
    float32, or of x and weights in bfloat16; and with splits of x in fixed point, half a step of
    the largest of each group.
    """
    u = ROUNDING[x.dtype]
    each = ROUNDING[torch.float32] * math.sqrt(case.columns)
    if kernel.startswith("gemm_bf16"):
        each += ROUNDING[torch.bfloat16] * math.sqrt(2)
    x = x.double()
    scaled = x[:, None] * case.scale  # [M, N, K]
    size = (scaled * case.base).square().sum(-1).sqrt()
    bound = u * expected.abs() + 4 * each * size
    steps = STEPS.get(kernel.rpartition("_")[2])
    if steps:
        for first in range(0, case.columns, case.layout.group_size):
            group = slice(first, first + case.layout.group_size)
            step = scaled[..., group].abs().amax(-1) / steps
            bound += step / 2 * case.base[:, group].abs().sum(-1)
    return bound


def assert_right(case, x, isa, bias=None):
    """The product is within the bound of the kernel that is reported for it."""
    expected = (x.double()[:, None] * case.scale * case.base).sum(-1)
    if bias is not None:
        expected += bias.double()
    result = case.linear(x, isa, bias)
    assert result.dtype == x.dtype
    kernel = case.kernel(isa, x.dtype, len(x))
    error = (result.double() - expected).abs()
    assert bool((error <= error_bound(case, x, expected, kernel)).all()), kernel
