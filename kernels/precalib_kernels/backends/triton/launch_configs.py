"""Fixed configurations: which kernel and which blocks, by chip family and M. No tuning at run time.

`python benchmarks/gpu/acceptance.py --steps tune` measures on a GPU and writes new entries.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one product is cut up.

    block_n:         rows of the weight per program, 64 or 128; 64 where a shard has odd tiles.
    block_m:         rows of x per program.
    warps:           of a program; two keep the tensor-core products of sm_80 on newer chips too.
    stages:          steps of words and activations in flight.
    programs_per_sm: programs wanted per multiprocessor; K is split until there are as many.
    registers:       most that a thread may take, None for the compiler's choice.
    long_registers:  the same for steps of 256 columns, None for no difference.
    """

    block_n: int
    block_m: int
    warps: int
    stages: int
    programs_per_sm: int
    registers: int | None = None
    long_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler takes of it."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# By family, which is an architecture, or "cuda" for NVIDIA's others: the largest M each entry
# serves. Beyond the last the weight is dequantized for a plain product.
_NVIDIA = {
    8: Blocks(64, 8, 2, 4, 6),
    16: Blocks(64, 16, 2, 4, 4),
    32: Blocks(64, 32, 2, 3, 3),
    64: Blocks(128, 64, 4, 3, 2),
}
TABLE: Mapping[str, Mapping[int, Blocks]] = {
    "cuda": _NVIDIA,
    # With these limits, found by trying, no layout of `cost_model.py` spills; without them some do.
    "sm_80": _NVIDIA | {64: Blocks(128, 64, 4, 3, 2, 252, 254)},
    "sm_89": _NVIDIA
    | {
        8: Blocks(64, 8, 2, 4, 6, 254),
        16: Blocks(64, 16, 2, 4, 4, 254),
        64: Blocks(128, 64, 4, 3, 2, 248),
    },
    "sm_90": {  # tuned on an H200, see benchmarks/results/gpu-h200.md
        8: Blocks(128, 8, 4, 4, 6),
        16: Blocks(128, 16, 4, 4, 6),
        32: Blocks(128, 32, 8, 3, 1),
        64: Blocks(128, 64, 8, 3, 2),
    },
    "sm_100": _NVIDIA
    | {
        16: Blocks(64, 16, 2, 4, 4, 254),
        32: Blocks(64, 32, 2, 3, 3, 241),
        64: Blocks(128, 64, 4, 3, 2, 254),
    },
    "hip": {
        16: Blocks(64, 16, 2, 2, 4),
        32: Blocks(64, 32, 4, 2, 2),
        128: Blocks(64, 64, 4, 2, 2),
    },
}


def family_of(target: str) -> str:
    """The row of `TABLE` for an architecture: "sm_90" or "gfx942"."""
    return "hip" if target.startswith("gfx") else target if target in TABLE else "cuda"


def blocks_for(family: str, rows: int, step: int) -> Blocks | None:
    """The entry for M rows; None where the weight is to be dequantized.

    Of steps of 256 columns instead of 128, one fewer is in flight, and a thread may have another
    limit of registers.
    """
    for most, blocks in TABLE[family].items():
        if rows <= most:
            if step == 128:
                return blocks
            registers = blocks.long_registers or blocks.registers
            stages = max(1, blocks.stages - 1)
            return dataclasses.replace(blocks, stages=stages, registers=registers)
    return None


def splits(blocks: Blocks, tiles: int, row_blocks: int, steps: int, processors: int) -> int:
    """Programs that share the steps of one tile, so that every multiprocessor has work."""
    wanted = blocks.programs_per_sm * processors // max(1, tiles * row_blocks)
    steps_each = -(-steps // max(1, min(wanted, steps)))
    return -(-steps // steps_each)  # no program without a step


@dataclasses.dataclass(frozen=True)
class SparseBlocks:
    """How the sum over salient weights is cut up (`salient_kernel`).

    block_n: rows of the weight per program.
    block_m: rows of x per program, and the largest M the entry serves; the last serves any.
    slots:   slots of a row taken at a time.
    warps:   of a program.
    """

    block_n: int
    block_m: int
    slots: int
    warps: int


# Few rows of x: many small programs, as each only waits for memory. Sums of a program stay within
# 32 registers of a thread.
SPARSE_TABLE = (
    SparseBlocks(4, 1, 128, 4),
    SparseBlocks(4, 8, 32, 4),
    SparseBlocks(4, 16, 32, 4),
    SparseBlocks(8, 32, 16, 4),
)


def sparse_blocks(rows: int) -> SparseBlocks:
    """The entry for M rows."""
    return next((blocks for blocks in SPARSE_TABLE if rows <= blocks.block_m), SPARSE_TABLE[-1])
