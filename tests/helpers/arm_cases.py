"""Packed weights for the Arm kernels, and what a product with one of them may be off by."""

import dataclasses
import math

import torch
from arm_emulator import Problem, Rows
from torch import Tensor
from x86_cases import LAYOUTS as X86_TESTED
from x86_cases import PLAIN_CODEBOOK, ROUNDING, STEPS

from precalib_kernels.backends.arm.memory_layout import ArmLayout
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout

LAYOUTS = {
    **X86_TESTED,
    "16 entries": Layout(bits=4, group_size=32, codebook=TRELLIS_CODEBOOKS[3], salient_count=2),
    "32 entries": Layout(bits=5, group_size=160, codebook=TRELLIS_CODEBOOKS[4], scale="log8"),
    "two bits, table": Layout(bits=2, group_size=256, codebook=PLAIN_CODEBOOK[::2]),
    "three bits, groups of 32": Layout(
        bits=3, group_size=32, codebook=TRELLIS_CODEBOOKS[3], trellis=True, column_scale=True
    ),
    "five bits, groups of 64": Layout(
        bits=5, group_size=64, codebook=TRELLIS_CODEBOOKS[5], trellis=True, salient_count=3
    ),
}


@dataclasses.dataclass
class ArmCase:
    """A packed weight of fused shards, with what it stands for.

    base:  weights of each shard without column scale, float64 [rows, K].
    scale: column scale of each shard, float64 [1, K].
    """

    memory: ArmLayout
    packed: Tensor
    base: list[Tensor]
    scale: list[Tensor]

    @property
    def columns(self) -> int:
        return self.memory.columns

    def problem(self, x: Tensor, isa: str, bias: Tensor | None = None) -> Problem:
        return Problem(self.memory, self.packed, x, isa, bias)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Rows:
        return Rows(self.memory, self.packed, ids, dtype)

    @property
    def weight(self) -> Tensor:
        """Ŵ in float64 [N, K]."""
        return torch.cat([b * s for b, s in zip(self.base, self.scale, strict=True)])

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Ŵᵀ + bias in float64 [M, N]."""
        product = x.double() @ self.weight.T
        return product if bias is None else product + bias.double()

    def bound(self, x: Tensor, expected: Tensor, kernel: str) -> Tensor:
        """What a product may be off by, [M, N].

        Rounding the result; four standard deviations of the rounding of K products and their sums
        in float32; and half a step of the largest activation of each group for each weight.
        """
        each = ROUNDING[torch.float32] * math.sqrt(self.columns)
        size, rounding = [], []
        for base, scale in zip(self.base, self.scale, strict=True):
            scaled = x.double() * scale
            size.append((scaled.square() @ base.square().T).sqrt())
            step = torch.zeros_like(size[-1])
            for first in range(0, self.columns, self.memory.layout.group_size):
                group = slice(first, first + self.memory.layout.group_size)
                largest = scaled[:, group].abs().amax(-1) / STEPS["int8" + kernel[-2:]]
                step += largest[:, None] / 2 * base[:, group].abs().sum(-1)
            rounding.append(step)
        return (
            ROUNDING[x.dtype] * expected.abs()
            + 4 * each * torch.cat(size, 1)
            + torch.cat(rounding, 1)
        )
