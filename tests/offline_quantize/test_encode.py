"""Encoding a weight: what is stored decodes to what was measured, also for hostile weights."""

import dataclasses

import pytest
import torch

from offline_quantize.balance import column_scale
from offline_quantize.encode import encode
from offline_quantize.recipes import RECIPES, adjust
from precalib_kernels import reference
from precalib_kernels.errors import SourceError


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    """Student-t weights with uneven rows and columns and a few outlier channels."""
    generator = torch.Generator().manual_seed(5)
    t = torch.randn((rows, columns), generator=generator) / (
        torch.randn((5, rows, columns), generator=generator).square().mean(0).sqrt()
    )
    row = torch.randn((rows, 1), generator=generator).mul(0.3).exp()
    column = torch.randn((1, columns), generator=generator).mul(0.3).exp()
    column[:, ::97] *= 8
    return 0.02 * t * row * column


def error(weight: torch.Tensor, recipe) -> float:
    encoded = encode(weight, recipe, "test")
    values = reference.dequantize(encoded.tensors, recipe.layout, weight.shape[1])
    found = float((values - weight.float()).square().sum() / weight.float().square().sum())
    assert encoded.statistics.summary()["relative_error"] == pytest.approx(found, rel=1e-4)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [32, 96, 128, 576])
@pytest.mark.parametrize("name", RECIPES)
def test_stored_tensors_follow_the_format_and_the_recorded_error(name, columns, dtype):
    recipe, weight = RECIPES[name], normal(70, columns).to(dtype)
    encoded = encode(weight, recipe, "test")
    recipe.layout.check(encoded.tensors, columns, "test")
    assert error(weight, recipe) < {5: 0.005, 4: 0.02, 3: 0.08}[recipe.layout.bits]


@pytest.mark.parametrize("options", [
    {"bits": 2}, {"bits": 3}, {"group_size": 32}, {"group_size": 256}, {"alpha": 0.0},
    {"alpha": 0.25}, {"alpha": 0.05, "salient_bits": 8}, {"salient_bits": 4},
])  # fmt: skip
@pytest.mark.parametrize("name", ["balanced-4", "paper-4"])
def test_adjusted_recipes_work(name, options):
    recipe = adjust(RECIPES[name], **options)
    assert error(normal(40, 576), recipe) < 0.25


@pytest.mark.parametrize("make", [normal, heavy_tailed])
@pytest.mark.parametrize("bits", [3, 4])
def test_balanced_beats_rounding_to_nearest_at_nearly_equal_size(make, bits):
    weight = make(256, 1024)
    ours, plain = RECIPES[f"balanced-{bits}"], RECIPES[f"rtn-{bits}"]
    more = ours.layout.bits_per_weight(4096, 4096) - plain.layout.bits_per_weight(4096, 4096)
    assert error(weight, ours) < 0.8 * 4**-more * error(weight, plain)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("weight", [
    torch.zeros(4, 96), torch.full((4, 96), 3.5), torch.full((4, 96), -1e-3),
    torch.eye(96)[:4], torch.eye(96)[:4] * 1e4, torch.cat([torch.zeros(2, 96), normal(2, 96)]),
    normal(4, 96) * 1e-3, normal(4, 96) * 1e5, torch.arange(96.0).repeat(4, 1),
], ids="zero constant small sparse spike zero-rows 2e-5 2e3 ramp".split())  # fmt: skip # noqa: SIM905
def test_hostile_weights_keep_their_values_in_sight(name, weight):
    recipe = RECIPES[name]
    encoded = encode(weight, recipe, "test")
    values = reference.dequantize(encoded.tensors, recipe.layout, 96)
    assert bool(values.isfinite().all())
    # A forced low bit leaves the next weights every fourth level, 4 * 8, 4 * 13 or 4 * 23 of 127.
    step = {5: 0.26, 4: 0.42, 3: 0.73}[recipe.layout.bits]
    assert bool(((values - weight).abs() <= step * weight.abs().max() + 1e-12).all())


def test_zero_weights_stay_zero_under_every_recipe():
    for recipe in RECIPES.values():
        encoded = encode(torch.zeros(3, 64), recipe, "test")
        assert not reference.dequantize(encoded.tensors, recipe.layout, 64).any()


def test_nothing_is_left_of_the_blocks_of_rows(monkeypatch):
    weight = normal(50, 256)
    whole = encode(weight, RECIPES["balanced-4"], "test")
    monkeypatch.setattr("offline_quantize.encode.BLOCK_WEIGHTS", 3 * 256)
    cut = encode(weight, RECIPES["balanced-4"], "test")
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, cut.tensors[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    weight = normal(8, 64)
    weight[5, 17] = bad
    with pytest.raises(SourceError, match=r"file: tensor 'x': weight \[5, 17\] is -?(nan|inf)"):
        encode(weight, RECIPES["balanced-4"], "file: tensor 'x'")


def test_weights_too_large_for_float16_scales_are_refused():
    with pytest.raises(SourceError, match="too large for float16"):
        encode(normal(8, 64) * 1e8, RECIPES["balanced-4"], "x")


def test_a_group_without_room_counts_its_overflow():
    weight = normal(16, 512)
    weight[:, :128] *= 10  # nearly all weights above one threshold per tensor are in one group
    recipe = dataclasses.replace(RECIPES["paper-4"])
    summary = encode(weight, recipe, "x").statistics.summary()
    assert summary["salient_overflow"] > 0
    stored = round(summary["salient_share"] * weight.numel())
    assert stored + summary["salient_overflow"] == pytest.approx(0.08 * weight.numel(), abs=1)
    assert stored >= 16 * recipe.layout.salient_count


def test_column_scale_evens_out_the_columns():
    weight = normal(256, 128) * torch.logspace(-1, 1, 128)
    scale = column_scale(weight, 16)
    assert scale.shape == (1, 128)
    assert torch.equal(scale, scale.half().float())
    spread = (weight / scale).square().mean(0).sqrt()
    assert float(spread.max() / spread.min()) < 1.3
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-3)
    assert torch.equal(column_scale(torch.zeros(4, 32), 16), torch.ones(1, 32))
