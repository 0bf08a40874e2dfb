"""The benchmark's peers: sizes by hand, levels by definition."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def peers(load: Any) -> ModuleType:
    module: ModuleType = load("peers")
    return module


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 160, generator=torch.Generator().manual_seed(0)) * 0.02


def error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 64), (4, 128), (5, 32)])
def test_rtn(peers: ModuleType, weight: Tensor, bits: int, group_size: int) -> None:
    found, stored = peers.rtn(weight, bits, group_size)
    groups = math.ceil(160 / group_size)
    assert stored == 24 * 160 * bits + 24 * groups * (16 + bits)
    for start in range(0, 160, group_size):
        part = slice(start, start + group_size)
        span = weight[:, part].amax(1).clamp(min=0) - weight[:, part].amin(1).clamp(max=0)
        step = span / (2**bits - 1)
        off = (found - weight)[:, part].abs().amax(1)
        assert bool(
            (off <= step * (0.5 + 0.5 + 0.01)).all()
        )  # rounding, and that of the zero point
        assert bool((off.mean() > step * 0.3).any())


def test_column_scale_pays_where_columns_differ(peers: ModuleType, weight: Tensor) -> None:
    uneven = weight * torch.logspace(-1, 1, 160)[torch.randperm(160)]
    relative = [
        float(((peers.rtn(uneven, 4, 32, balance)[0] - uneven) / uneven.std(0)).square().mean())
        for balance in (False, True)
    ]
    assert relative[1] < relative[0] / 2
    assert peers.rtn(uneven, 4, 32, True)[1] - peers.rtn(uneven, 4, 32)[1] == 16 * 160


def test_hqq(peers: ModuleType, weight: Tensor) -> None:
    """At the size of real weights its steps move a group's zero point until the mean error is 0."""
    weight = weight[:, :128]
    found, stored = peers.hqq(weight, 3, 64)
    assert stored == 24 * 128 * 3 + 24 * 2 * 32
    drift, rounded = (
        float((q - weight).view(-1, 64).mean(1).abs().mean())
        for q in (found, peers.rtn(weight, 3, 64)[0])
    )
    assert drift < rounded / 2
    assert error(found, weight) < 1.05 * error(peers.rtn(weight, 3, 64)[0], weight)


def test_nf4(peers: ModuleType, weight: Tensor) -> None:
    levels = peers.normal_float_levels()
    assert (len(levels), float(levels[0]), float(levels[7]), float(levels[15])) == (16, -1, 0, 1)
    published = {1: -0.6961928, 6: -0.0910500, 8: 0.0795803, 14: 0.7229568}  # QLoRA, appendix E
    for index, level in published.items():
        assert float(levels[index]) == pytest.approx(level, abs=2e-7)
    found, stored = peers.nf4(weight, 64)
    assert stored == 24 * 160 * 4 + 24 * 3 * 16
    assert 0.003 < error(found, weight) < 0.012
