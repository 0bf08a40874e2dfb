"""Encoding a weight: what is stored decodes to what was measured, also for hostile weights."""

import dataclasses

import pytest
import torch

from offline_quantize.method.encode import encode, encode_groups, prepare_matrix, prepare_rows
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import RECIPES, adjust
from offline_quantize.method.sinkhorn import column_scale
from precalib_kernels.errors import SourceError, UnfitError
from precalib_kernels.format import reference


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
    assert error(weight, recipe) < {5: 0.005, 4: 0.02, 3: 0.08, 2: 0.25}[recipe.layout.bits]


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
    # A forced low bit leaves the next weights every fourth level, 4 * 8, 4 * 13 or 4 * 23 of 127;
    # with 2 bits, two of eight levels, -95 and 11 or the like.
    step = {5: 0.26, 4: 0.42, 3: 0.73, 2: (127 - 11) / 127}[recipe.layout.bits]
    assert bool(((values - weight).abs() <= step * weight.abs().max() + 1e-12).all())


def test_zero_weights_stay_zero_under_every_recipe():
    for recipe in RECIPES.values():
        encoded = encode(torch.zeros(3, 64), recipe, "test")
        assert not reference.dequantize(encoded.tensors, recipe.layout, 64).any()


def test_nothing_is_left_of_the_blocks_of_rows(monkeypatch):
    weight = normal(50, 256)
    whole = encode(weight, RECIPES["balanced-4"], "test")
    monkeypatch.setattr("offline_quantize.method.encode.BLOCK_WEIGHTS", 3 * 256)
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


# relative error of a normal under plain rounding and with a trellis or salient weights
ROUNDED = {2: 0.25, 3: 0.047, 4: 0.0105, 5: 0.0026}
EVERYWHERE = (slice(None), slice(None))
PLACES = {
    "matrix": EVERYWHERE,
    "row": (5, slice(None)),
    "column": (slice(None), 7),
    "two columns": (slice(None), [7, 200]),
    "every other row": (slice(None, None, 2), slice(None)),
    "every other column": (slice(None), slice(None, None, 2)),
    "group": (5, slice(128, 256)),
    "groups": (slice(None), slice(128, 256)),
}
SIZES = (1e-45, 1e-38, 1e-30, 1e-21, 1e-20, 1e-16, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1.0, 1e3, 1e4)


def sized(place: str, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of .02 with a part of another size, and where that part is not."""
    weight, rest = normal(64, 384), torch.ones((64, 384), dtype=torch.bool)
    weight[PLACES[place]] *= 50 * size
    rest[PLACES[place]] = False
    return weight, rest


def squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


@pytest.mark.parametrize("place", [place for place in PLACES if place != "matrix"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_part_of_any_size_leaves_the_others_as_good(name, place):
    recipe = RECIPES[name]
    bound = 3 * ROUNDED[recipe.layout.bits]
    for size in SIZES:
        if name.startswith("rtn") and size == 1e4:
            continue  # their ranges end at 65504
        weight, rest = sized(place, size)
        encoded = encode(weight, recipe, "test")
        error = reference.dequantize(encoded.tensors, recipe.layout, 384) - weight
        assert squared(error) <= bound * squared(weight), size
        if size < 0.01:
            assert squared(error[rest]) <= bound / 2 * squared(weight[rest]), size


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_of_any_size_is_coded_as_well_or_refused(name):
    recipe = RECIPES[name]
    smallest = 1e-12 if recipe.layout.column_scale else 1e-7  # that float16 scales hold
    for size in SIZES:
        weight, _ = sized("matrix", size)
        if smallest <= size <= 1e3:
            assert error(weight, recipe) <= 1.5 * ROUNDED[recipe.layout.bits], size
        elif size < smallest:
            with pytest.raises(
                UnfitError, match=r"^x: .* error of 1 where .*too small for float16"
            ):
                encode(weight, recipe, "x")


@pytest.mark.parametrize("name", RECIPES)
def test_the_largest_float32_is_refused(name):
    weight = normal(8, 64)
    weight[3, 5], weight[4, 6] = 3e38, -3e38
    with pytest.raises(UnfitError, match="too large for float16"):
        encode(weight, RECIPES[name], "x")


@pytest.mark.parametrize("name", RECIPES)
def test_a_power_of_two_changes_nothing_but_float16_scales(name):
    weight, recipe = heavy_tailed(40, 256), RECIPES[name]
    one, other = (encode(w, recipe, "x") for w in (weight, weight / 4))
    scaled = {"row_scale", "salient_scale", "salient_offset"}
    scaled |= {"scales"} if recipe.layout.scale == "float16" else set()
    for suffix, tensor in one.tensors.items():
        expected = tensor / 4 if suffix in scaled else tensor
        assert torch.equal(other.tensors[suffix], expected), suffix
    assert one.statistics.summary() == other.statistics.summary()


def sparse(share: float) -> torch.Tensor:
    weight = normal(64, 384)
    return weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share)


@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"group_size": 32}, {"alpha": 0.0}], ids=str)
@pytest.mark.parametrize("name", ["balanced-4", "paper-3", "rtn-3"])
@pytest.mark.parametrize("weight", [
    sparse(0.5), sparse(0.1), sparse(0.03), sparse(0.01), normal(64, 384).exp(),
    normal(64, 384) / normal(64, 384, 1).abs().clamp_min(1e-4), normal(64, 2) @ normal(2, 384),
    normal(64, 384).sign(), torch.full((64, 384), 0.7), torch.eye(384)[:64],
    normal(64, 384) * torch.logspace(-3, 3, 384), torch.arange(384.0).repeat(64, 1),
], ids="1/2 .1 3% 1% even cauchy low-rank signs constant one-hot uneven ramp".split())  # fmt: skip # noqa: SIM905
def test_a_shape_that_suits_a_recipe_badly_is_no_fault(name, options, weight):
    encode(weight, adjust(RECIPES[name], **options), "test")


@pytest.mark.parametrize("damage", ["nan", "inf", "zero", "uneven"])
@pytest.mark.parametrize("name", ["balanced-3", "balanced-4"])
def test_a_ruined_column_scale_is_refused(monkeypatch, name, damage):
    def ruined(weight, iterations, mean_square):
        scale = column_scale(weight, iterations)
        if damage == "uneven":
            return scale * torch.where(torch.arange(scale.numel()) % 64 == 0, 1000, 1)
        scale[0, 5] = float(damage.replace("zero", "0"))
        return scale

    monkeypatch.setattr("offline_quantize.method.encode.column_scale", ruined)
    with pytest.raises(UnfitError, match=r"^x: "):
        encode(normal(64, 384), RECIPES[name], "x")


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.layout.trellis])
def test_errors_count_by_the_size_of_the_inputs_where_it_is_known(name):
    recipe, size = RECIPES[name], RECIPES[name].layout.group_size
    weight = torch.randn(64, 2 * size + 32)  # a ragged last group
    mean_square = torch.randn(weight.shape[1]).mul(2).exp()
    mean_square[5] = 0  # a dead input
    inputs = InputStatistics(mean_square)
    matrix = prepare_matrix(weight, recipe, "test", inputs)
    rows = prepare_rows(weight, matrix, recipe)
    plain = encode_groups(rows, recipe).codes.values
    encoded = encode(weight, recipe, "test", inputs)
    weighed = reference.dequantize(encoded.tensors, recipe.layout, weight.shape[1])

    def loss(values):  # of each row and group, by definition: what the error adds to the output
        part = mean_square * (weight - values).square()
        return torch.nn.functional.pad(part, (0, size - 32)).view(64, 3, size).sum(-1)

    before = loss(plain.flatten(1)[:, : weight.shape[1]] * matrix.column_scale)
    after = loss(weighed)
    assert (after <= before * 1.0001).all()  # every group is searched for its own best path
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_type_of_torch_changes_nothing(recipe):
    """An engine that loads a model sets it to that of the model."""
    weight = (torch.randn(48, 160) * 0.02).bfloat16()
    expected = encode(weight, RECIPES[recipe], "test").tensors
    torch.set_default_dtype(torch.bfloat16)
    try:
        tensors = encode(weight, RECIPES[recipe], "test").tensors
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))
