"""Random packed tensors, and the layouts that the recipes make, for tests without the quantizer."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient


def _balanced(bits: int, salient_count: int, salient_bits: int) -> Layout:
    return Layout(
        bits=bits,
        group_size=128,
        codebook=TRELLIS_CODEBOOKS[bits],
        trellis=True,
        scale="log8",
        salient_count=salient_count,
        salient_bits=salient_bits,
        salient_grid="row",
        column_scale=True,
    )


def _paper(bits: int) -> Layout:
    return Layout(
        bits=bits, group_size=128, salient_count=16, salient_bits=bits, salient_grid="min-max"
    )


# `tests/test_helpers.py` holds them against the recipes.
RECIPE_LAYOUTS = {
    "balanced-4": _balanced(4, 2, 8),
    "balanced-3": _balanced(3, 4, 7),
    "balanced-5": _balanced(5, 2, 8),
    "balanced-2": _balanced(2, 4, 6),
    "paper-4": _paper(4),
    "paper-3": _paper(3),
    "rtn-4": Layout(bits=4, group_size=128),
    "rtn-3": Layout(bits=3, group_size=128),
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed tensors of a weight of `shape`, and the pieces they were made from."""

    layout: Layout
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    codes: Tensor
    positions: Tensor | None
    high: Tensor | None


def random_packed(
    layout: Layout,
    rows: int,
    columns: int,
    seed: int = 0,
    log_codes: int = 256,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Packed:
    """Valid packed tensors with every code in use.

    log_codes: how many of the largest scales of "log8" are in use.
    ranges:    of float tensors, by name; from 0.1 to 1.1 for those that are not named.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in layout.tensors(rows, columns).items():
        if dtype == torch.uint8:
            high = {"zeros": 2**layout.bits, "scales": log_codes}.get(name, 256)
            tensors[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
        else:
            low, top = (ranges or {}).get(name, (0.1, 1.1))
            tensors[name] = (low + (top - low) * torch.rand(shape, generator=generator)).to(dtype)
    codes = torch.randint(0, 2**layout.bits, (rows, columns), generator=generator)
    codes = codes.to(torch.uint8)
    tensors["qweight"] = pack_bits(codes, layout.bits)
    positions = high_codes = None
    if layout.salient_count:
        positions = random_positions(layout, rows, columns, seed)
        extra = layout.salient_bits - layout.bits
        high_codes = torch.randint(0, 2**extra, positions.shape, generator=generator)
        high_codes = torch.where(positions < 0, 0, high_codes).to(torch.uint8)
        tensors["salient"] = pack_salient(positions, high_codes, layout)
    return Packed(layout, (rows, columns), tensors, codes, positions, high_codes)


def random_positions(layout: Layout, rows: int, columns: int, seed: int) -> Tensor:
    """Random sets of random sizes, within the columns that exist."""
    generator = torch.Generator().manual_seed(seed)
    groups, size, count = layout.groups(columns), layout.group_size, layout.salient_count
    score = torch.rand((rows, groups, size), generator=generator)
    column = torch.arange(groups * size).view(groups, size)
    score[:, column >= columns] = 2
    positions = score.argsort(-1)[..., :count].sort(-1).values
    used = torch.randint(0, count + 1, (rows, groups, 1), generator=generator)
    return torch.where(torch.arange(count) < used, positions, -1).short()
