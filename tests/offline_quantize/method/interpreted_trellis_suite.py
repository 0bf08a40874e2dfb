"""The trellis search of a GPU, run by `test_trellis.py` in a process of its own.

Triton decides when it is imported whether kernels are interpreted. Without TRITON_INTERPRET they
run on a GPU.
"""

import os

import pytest
import torch

from offline_quantize.method import trellis
from offline_quantize.method.trellis import FREE
from offline_quantize.method.trellis_triton import search_triton
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


def layout(bits: int, group_size: int) -> Layout:
    return Layout(bits, group_size, TRELLIS_CODEBOOKS[bits], trellis=True)


def inputs(groups: int, size: int):
    weights = torch.randn(groups, size)
    low_bits = torch.randint(0, 20, weights.shape).clamp(max=FREE).to(torch.uint8)
    return weights, (127 / weights.abs().amax(1))[None], low_bits


def check(case, chosen: Layout, importance=None) -> None:
    """The same codes and entries as by the search in torch, bit for bit."""
    there = None if importance is None else importance.to(DEVICE)
    found = search_triton(*(tensor.to(DEVICE) for tensor in case), chosen, there)
    expected = trellis.search_torch(*case, chosen, importance)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codes_are_those_of_the_cpu(bits):
    check(inputs(67, 64), layout(bits, 64))


@pytest.mark.parametrize("size", [32, 96, 128])
def test_groups_of_every_size(size):
    check(inputs(3, size), layout(4, size))


def test_importances():
    case, importance = inputs(9, 64), torch.randn(9, 64).exp()
    importance[:, ::7] = 0
    check(case, layout(3, 64), importance)
    plain, weighted = (
        search_triton(*(tensor.to(DEVICE) for tensor in case), layout(3, 64), each)
        for each in (None, importance.to(DEVICE))
    )
    assert not torch.equal(plain[0], weighted[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_each_group_gets_the_scale_of_least_error(weighted):
    weights, unit, low_bits = inputs(40, 64)
    several = weights, torch.cat([unit, 1.1 * unit, 0.5 * unit]), low_bits
    check(several, layout(3, 64), torch.randn(40, 64).exp() if weighted else None)


def test_degenerate_groups():
    weights = torch.tensor([[0.0] * 32, [1e30] * 32, [-1e-30] * 32, [1.0, -1.0] * 16])
    weights = torch.cat([weights, torch.randn(4, 32)])
    weights[4, ::3], weights[5, 5], weights[6] = torch.nan, torch.inf, -torch.inf
    unit = torch.tensor([[0.0, 127e-30, 127e30, 127.0, 40.0, 40.0, 0.0, torch.nan]])
    low_bits = torch.full((8, 32), FREE, dtype=torch.uint8)
    low_bits[3] = torch.arange(32) % 2
    check((weights, unit, low_bits), layout(4, 32))


def test_ties_are_broken_alike():
    """Halves between two integers, and weights that several paths reach at the same cost."""
    weights = torch.arange(-64, 64).repeat(2, 1).view(4, 64) / 2
    weights[2] = 0
    check((weights, torch.ones(1, 4), torch.full((4, 64), FREE, dtype=torch.uint8)), layout(2, 64))


def test_tensors_are_made_on_the_device_of_the_weights():
    case = [tensor.to(DEVICE) for tensor in inputs(3, 32)]
    expected = search_triton(*case, layout(4, 32))
    with torch.device("meta"):  # whatever took its device from there could not be computed with
        found = search_triton(*case, layout(4, 32))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
