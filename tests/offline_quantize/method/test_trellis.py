"""The trellis search: optimal, the same compiled and in torch, and it pays."""

import itertools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offline_quantize.method import trellis
from offline_quantize.method.lloyd import trained_codebook
from offline_quantize.method.trellis import FREE
from precalib_kernels.format import reference
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build


def layout(bits: int, group_size: int = 128) -> Layout:
    return Layout(bits=bits, group_size=group_size, codebook=TRELLIS_CODEBOOKS[bits], trellis=True)


def inputs(groups: int, size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((groups, size), generator=generator)
    unit = (127 / weights.abs().amax(1))[None]
    low_bits = torch.where(torch.rand((groups, size), generator=generator) < 0.1, 0, FREE)
    low_bits += (low_bits == 0) & (torch.rand((groups, size), generator=generator) < 0.5)
    return weights, unit, low_bits.to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("groups", [1, 15, 16, 50])
def test_compiled_and_torch_search_agree_bit_for_bit(bits, groups):
    case = inputs(groups, 96, seed=groups)
    ours = trellis.search_native(*case, layout(bits), build.load(trellis.SOURCE))
    for a, b in zip(ours, trellis.search_torch(*case, layout(bits)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [1, 16, 50])
def test_compiled_and_torch_search_agree_on_importances_bit_for_bit(groups):
    case = inputs(groups, 96, seed=groups)
    importance = torch.randn(groups, 96).exp()
    importance[:, ::7] = 0
    library = build.load(trellis.SOURCE)
    ours = trellis.search_native(*case, layout(3), library, importance)
    theirs = trellis.search_torch(*case, layout(3), importance)
    unweighted = trellis.search_native(*case, layout(3), library)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(ours[0], unweighted[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(2, 50), (3, 16), (4, 15), (5, 33)])
def test_each_group_gets_the_scale_of_least_error(bits, groups, weighted):
    weights, unit, low_bits = inputs(groups, 96, seed=bits)
    unit = torch.cat([unit, 1.1 * unit, 1.2 * unit, 0.5 * unit])
    importance = torch.randn(groups, 96).exp() if weighted else None
    case = weights, unit, low_bits, layout(bits)
    ours = trellis.search_native(*case, build.load(trellis.SOURCE), importance)
    for one, two in zip(ours, trellis.search_torch(*case, importance), strict=True):
        assert torch.equal(one, two)
    losses = []
    for number, each in enumerate(unit):
        alone = trellis.search(weights, each[None], low_bits, layout(bits), importance)
        took = ours.chosen == number
        assert torch.equal(ours.codes[took], alone.codes[took])
        assert torch.equal(ours.entries[took], alone.entries[took])
        error = (weights - alone.entries / each[:, None]).square() * (low_bits == FREE)
        losses.append((error if importance is None else error * importance).sum(1))
    least = torch.stack(losses).amin(0)
    taken = torch.stack(losses).gather(0, ours.chosen[None].long())[0]
    assert torch.allclose(taken, least, rtol=1e-5)
    assert len(ours.chosen.unique()) > 1


def test_of_equally_good_scales_a_group_gets_the_first():
    weights, unit, low_bits = inputs(20, 64)
    weights[3] = 0.0
    case = weights, torch.cat([unit, unit]), low_bits, layout(4, 64)
    for found in (trellis.search(*case), trellis.search_torch(*case)):
        assert not found.chosen.any()


def test_degenerate_groups_agree_too():
    weights = torch.tensor([[0.0] * 32, [1e30] * 32, [-1e-30] * 32, [1.0, -1.0] * 16])
    unit = torch.tensor([[0.0, 127e-30, 127e30, 127.0]])
    low_bits = torch.full((4, 32), FREE, dtype=torch.uint8)
    low_bits[3] = torch.arange(32) % 2
    ours = trellis.search_native(weights, unit, low_bits, layout(4), build.load(trellis.SOURCE))
    theirs = trellis.search_torch(weights, unit, low_bits, layout(4))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_what_is_not_a_number_counts_as_zero(bits):
    weights, unit, low_bits = inputs(40, 64)
    chance = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1))
    zeroed = weights.masked_fill(chance < 0.2, 0.0)
    weights = weights.masked_fill(chance < 0.2, torch.nan)
    weights[7], unit[0, 7], zeroed[7] = torch.inf, 0.0, 0.0
    unit[0, 8], zeroed[8] = torch.nan, 0.0
    ours = trellis.search_native(
        weights, unit, low_bits, layout(bits, 64), build.load(trellis.SOURCE)
    )
    theirs = trellis.search_torch(weights, unit, low_bits, layout(bits, 64))
    finite = trellis.search_torch(zeroed, unit.nan_to_num(0.0), low_bits, layout(bits, 64))
    for one, two, three in zip(ours, theirs, finite, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, three)


@pytest.mark.parametrize("seed", range(5))
def test_no_path_is_better_than_the_one_found(seed):
    length = 7  # 4**7 paths, all tried
    weights, unit, low_bits = inputs(3, 32, seed)
    weights, low_bits = weights[:, :length].contiguous(), low_bits[:, :length].contiguous()
    two = layout(2, 32)
    entries = trellis.search(weights, unit, low_bits, two).entries
    free = low_bits == FREE
    found = ((entries - weights * unit[0, :, None]).square() * free).sum(1)
    paths = torch.tensor(list(itertools.product(range(4), repeat=length)), dtype=torch.uint8)
    values = torch.tensor(TRELLIS_CODEBOOKS[2])[reference.codebook_index(paths, two).int()]
    for g in range(3):
        fits = ((paths & 1) == low_bits[g]) | free[g]
        allowed = values[fits.all(1)]
        errors = ((allowed - weights[g] * unit[0, g]).square() * free[g]).sum(1)
        assert float(found[g]) == pytest.approx(float(errors.min()), rel=1e-5)


def test_codes_decode_to_the_levels_and_keep_forced_bits():
    weights, unit, low_bits = inputs(20, 128)
    codes, entries, _ = trellis.search(weights, unit, low_bits, layout(3))
    assert torch.equal((codes & 1)[low_bits != FREE], low_bits[low_bits != FREE])
    decoded = torch.tensor(TRELLIS_CODEBOOKS[3])[reference.codebook_index(codes, layout(3)).int()]
    assert torch.equal(decoded[low_bits == FREE].float(), entries[low_bits == FREE])


def test_trellis_lowers_the_error_by_about_a_decibel():
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn((2000, 128), generator=generator)
    unit = (127 / weights.abs().amax(1))[None]
    free = torch.full(weights.shape, FREE, dtype=torch.uint8)
    entries = trellis.search(weights, unit, free, layout(4)).entries
    plain = torch.tensor((*TRELLIS_CODEBOOKS[4][::2], 127))  # as many entries as codes, no trellis
    nearest = plain[(weights[..., None] * unit[0, :, None, None] - plain).abs().argmin(-1)]
    errors = [(x - weights * unit[0, :, None]).square().mean() for x in (entries, nearest)]
    assert float(errors[0]) < 0.8 * float(errors[1])


def test_without_a_compiler_torch_searches_and_says_so(monkeypatch):
    def refuse(_):
        raise build.BuildError("no compiler today")

    trellis._native.cache_clear()
    monkeypatch.setattr(build, "load", refuse)
    case = inputs(4, 64)
    try:
        with pytest.warns(UserWarning, match="will be slow: no compiler today"):
            slow = trellis.search(*case, layout(4, 64))
    finally:
        trellis._native.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = trellis.search(*case, layout(4, 64))
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


@pytest.mark.parametrize(("bits", "count"), [(2, 4), (3, 4), (4, 2), (5, 2)])
def test_the_codebooks_of_the_recipes_are_the_trained_ones(bits, count):
    codebook = trained_codebook(bits, 128, count)
    assert codebook == TRELLIS_CODEBOOKS[bits]
    assert codebook == tuple(-entry for entry in reversed(codebook))
    assert all(entry % 2 for entry in codebook)


def test_importances_choose_the_path_of_least_weighed_error():
    weights, unit, low_bits = inputs(3, 7)
    low_bits.fill_(FREE)
    two, importance = layout(2, 32), torch.rand((3, 7), generator=torch.Generator().manual_seed(4))
    entries = trellis.search(weights, unit, low_bits, two, importance).entries
    paths = torch.tensor(list(itertools.product(range(4), repeat=7)), dtype=torch.uint8)
    values = torch.tensor(TRELLIS_CODEBOOKS[2])[reference.codebook_index(paths, two).int()]
    for g in range(3):
        found = ((entries[g] - weights[g] * unit[0, g]).square() * importance[g]).sum()
        errors = ((values - weights[g] * unit[0, g]).square() * importance[g]).sum(1)
        assert float(found) == pytest.approx(float(errors.min()), rel=1e-5)


@pytest.mark.slow
def test_the_search_of_a_gpu_is_that_of_the_cpu_under_the_interpreter(run_suite):
    suite = Path(__file__).with_name("interpreted_trellis_suite.py")
    run_suite(["-m", "pytest", suite], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_a_gpu_takes_triton_where_it_can(monkeypatch):
    taken = []
    monkeypatch.setattr(trellis, "has_triton", lambda: True)
    module = SimpleNamespace(search_triton=lambda *_: taken.append("triton"))
    monkeypatch.setitem(sys.modules, "offline_quantize.method.trellis_triton", module)
    monkeypatch.setattr(trellis, "search_torch", lambda *_: taken.append("torch"))
    weights = SimpleNamespace(device=torch.device("cuda"))
    trellis.search(weights, None, None, layout(4))
    monkeypatch.setattr(trellis, "has_triton", lambda: False)
    trellis.search(weights, None, None, layout(4))
    assert taken == ["triton", "torch"]
