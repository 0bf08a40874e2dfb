"""Layouts and packed tensors for the tests of the format."""

import dataclasses

import pytest
import torch
from torch import Tensor

from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient


@dataclasses.dataclass(frozen=True)
class Packed:
    """Random packed tensors and the pieces they were made from."""

    layout: Layout
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    codes: Tensor
    positions: Tensor | None
    high: Tensor | None


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


@pytest.fixture
def make_packed():
    def make(layout: Layout, rows: int = 5, columns: int = 160, seed: int = 0) -> Packed:
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in layout.tensors(rows, columns).items():
            if dtype == torch.uint8:
                high = 2**layout.bits if name == "zeros" else 256
                tensors[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
            else:
                tensors[name] = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
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

    return make
