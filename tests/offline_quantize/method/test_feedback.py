"""Error feedback: it pays, it is what its formulas say, and the same compiled and in torch."""

import dataclasses
import itertools
import pathlib
import platform
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from random_hessians import correlated
from torch import Tensor

from offline_quantize.method import feedback
from offline_quantize.method.encode import (
    SHRINKS,
    encode,
    encode_groups,
    encode_rows,
    prepare_matrix,
    prepare_rows,
)
from offline_quantize.method.feedback_factor import FeedbackFactor, feedback_factor
from offline_quantize.method.feedback_task import FeedbackTask
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import RECIPES, Recipe, adjust
from offline_quantize.method.salient_steps import SalientSteps
from precalib_kernels.errors import SourceError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build


def with_layout(name: str, **changes) -> Recipe:
    recipe = RECIPES[name]
    iterations = recipe.sinkhorn_iterations if changes.get("column_scale", True) else 0
    layout = dataclasses.replace(recipe.layout, **changes)
    return dataclasses.replace(recipe, layout=layout, sinkhorn_iterations=iterations)


NEAREST = {"trellis": False, "codebook": RECIPES["balanced-4"].layout.codebook[::2]}
KINDS: dict[str, Recipe] = {
    **RECIPES,
    "no salient weights": adjust(RECIPES["balanced-4"], alpha=0.0),
    "groups of 32": adjust(RECIPES["balanced-4"], group_size=32, alpha=0.05),
    "groups of 96": adjust(RECIPES["balanced-3"], group_size=96),
    "nearest entry": with_layout("balanced-4", **NEAREST),
    "sign and magnitude": with_layout("balanced-4", salient_grid="sign-magnitude"),
    "both": with_layout("balanced-4", **NEAREST, salient_grid="sign-magnitude"),
}
kinds = pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS)


@pytest.fixture
def one_scale(monkeypatch) -> None:
    """Each group gets the scale that it has without feedback."""
    monkeypatch.setattr("offline_quantize.method.encode.SHRINKS", (1.0,))


def known(hessian: Tensor) -> InputStatistics:
    return InputStatistics(hessian.diagonal().clone(), hessian)


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    error = (weight - values).double()
    return float(((error @ hessian.double()) * error).sum())


def decoded(weight: Tensor, recipe: Recipe, inputs: InputStatistics) -> Tensor:
    tensors = encode(weight, recipe, "x", inputs).tensors
    return reference.dequantize(tensors, recipe.layout, weight.shape[1])


@kinds
def test_the_loss_of_the_output_falls(weights, recipe):
    weight, hessian = weights(torch.float32)(40, 352), correlated(352)
    plain = decoded(weight, recipe, InputStatistics(hessian.diagonal()))
    ours = decoded(weight, recipe, known(hessian))
    assert loss(weight, ours, hessian) < 0.85 * loss(weight, plain, hessian)


@kinds
def test_values_are_what_a_decoder_finds(weights, recipe):
    weight, hessian = weights(torch.float32)(10, 224), correlated(224)
    matrix = prepare_matrix(weight, recipe, "x", known(hessian))
    rows = prepare_rows(weight, matrix, recipe)
    values = encode_rows(rows, recipe, matrix.factor).codes.values.flatten(1)[:, :224]
    scale = 1 if matrix.column_scale is None else matrix.column_scale
    assert torch.equal(values * scale, decoded(weight, recipe, known(hessian)))


@kinds
@pytest.mark.usefixtures("one_scale")
@pytest.mark.parametrize("columns", [96, 352])
def test_without_correlation_codes_are_those_found_without_feedback(weights, recipe, columns):
    weight = weights(torch.float32)(200, columns)
    matrix = prepare_matrix(weight, recipe, "x")
    rows = prepare_rows(weight, matrix, recipe)
    plain = encode_groups(rows, recipe).codes
    ours = encode_rows(rows, recipe, feedback_factor(torch.eye(columns))).codes
    inside = (slice(None), slice(columns))
    for found, wanted in ((ours.base, plain.base), (ours.values, plain.values)):
        assert torch.equal(found.flatten(1)[inside], wanted.flatten(1)[inside])
    assert torch.equal(ours.salient[rows.salient.used], plain.salient[rows.salient.used])


@pytest.mark.usefixtures("one_scale")
@pytest.mark.parametrize("bits", [3, 4])
def test_round_to_nearest_follows_gptq(bits):
    """The textbook recursion, in float64, with the factor of the inverse."""
    recipe, size = RECIPES[f"rtn-{bits}"], 160
    weight, hessian = torch.randn(30, size), correlated(size)
    tensors = encode(weight, recipe, "x", known(hessian)).tensors
    damped = hessian.double() + hessian.double().diagonal().mean() * torch.eye(size).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    target, codes = weight.double(), torch.empty(30, size, dtype=torch.int64)
    for k in range(size):
        group = k // 128
        step = tensors["scales"][:, group].double() / (2**bits - 1)
        zero = tensors["zeros"][:, group].double()
        codes[:, k] = (target[:, k] / step + zero).round().clamp(0, 2**bits - 1)
        error = (target[:, k] - (codes[:, k] - zero) * step) / upper[k, k]
        target[:, k:] -= error[:, None] * upper[k, k:]
    found = reference.unpack_bits(tensors["qweight"], bits, size).long()
    rows = (found != codes).any(1)  # a tie that float32 decides the other way changes all that
    assert int(rows.sum()) <= 1  # follows


Path = tuple[float, list[int], list[float]]  # loss, codes, errors


def best_paths(
    weight: list[float], factor: FeedbackFactor, step: float, layout: Layout, forced: dict[int, int]
) -> list[int]:
    """Codes of one group: of the paths to each state those of least loss so far go on.

    forced: salient columns, and how far their codes are above their values, in whole numbers.
    """
    effects, importance = factor.effects.double(), factor.importance.double()
    paths: list[Path] = [(0.0, [], [])]
    for k, w in enumerate(weight):
        found: dict[tuple[int, int], list[Path]] = {}
        for cost, codes, errors in paths:
            one, two = ([0, 0, *codes][i] & 1 for i in (-1, -2))
            target = w + sum(e * float(effects[j, k]) for j, e in enumerate(errors))

            def level(code: int, one: int = one, two: int = two) -> int:
                return layout.codebook_values[2 * (code ^ two) + one]

            options = []
            for u in (0, 1):  # the entry nearest to the whole number at the target
                point = round(target / step)
                codes_of_u = range(u, 2**layout.bits, 2)
                code = min(codes_of_u, key=lambda c: (abs(level(c) - point), level(c)))
                options.append((code, step * level(code)))
            if k in forced:
                options = [(round(target) + forced[k], float(round(target)))]
            for code, value in options:
                total = cost + float(importance[k]) * (target - value) ** 2
                path = (total, [*codes, code], [*errors, w - value])
                found.setdefault((code & 1, one), []).append(path)
        paths = [path for ways in found.values() for path in sorted(ways)[:1]]
    return min(paths)[1]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("salient", [False, True], ids=["", "salient"])
def test_each_state_keeps_the_errors_of_its_own_path(bits, salient):
    recipe = adjust(RECIPES["balanced-3"], bits=bits, group_size=64)
    size, layout = 64, recipe.layout
    weight = torch.randn(12, size)
    factor = feedback_factor(correlated(size), damping=0.1)
    forced = {7: 64, 40: 64} if salient else {}
    mask = torch.zeros(12, size, dtype=torch.uint8)
    mask[:, list(forced)] = 1
    weight[:, list(forced)] *= 20
    ones = torch.ones(12)
    task = FeedbackTask(
        target=weight, mask=mask, columns=size, factor=factor,
        unit=torch.full((1, 12, 1), 32.0), step=torch.full((1, 12, 1), 1 / 32), zero=None,
        grid=SalientSteps(ones, ones, 0 * ones, -63, 63, 64), layout=layout,
    )  # fmt: skip
    codes = feedback.encode_native(task, build.load(feedback.SOURCE)).codes
    for row in range(12):
        wanted = best_paths(weight[row].tolist(), factor, 1 / 32, layout, forced)
        assert codes[row].tolist() == wanted


def test_no_path_through_a_short_group_is_much_better():
    """All 4**7 paths, by the loss itself: the search finds one that is near the best."""
    size, layout = 7, Layout(bits=2, group_size=32, codebook=KINDS["balanced-2"].layout.codebook,
                             trellis=True)  # fmt: skip
    weight, hessian = torch.randn(8, size), correlated(size)
    factor = feedback_factor(hessian, damping=0.01)
    flat = torch.nn.functional.pad(weight, (0, 32 - size))
    scale = torch.full((1, 8, 1), 50.0)
    task = FeedbackTask(
        flat, torch.zeros(8, 32, dtype=torch.uint8), size, factor, scale, 1 / scale, None, None,
        layout,
    )  # fmt: skip
    values = feedback.encode_native(task, build.load(feedback.SOURCE)).values
    paths = torch.tensor(list(itertools.product(range(4), repeat=size)), dtype=torch.uint8)
    all_values = torch.tensor(layout.codebook_values)[reference.codebook_index(paths, layout).int()]
    metric = factor.effects * factor.importance @ factor.effects.T
    ratios = []
    for row in range(8):
        errors = weight[row] - all_values / 50
        losses = ((errors @ metric) * errors).sum(1)
        ours = loss(weight[row : row + 1], values[row : row + 1, :size], metric)
        ratios.append(ours / float(losses.min()))
    assert min(ratios) == pytest.approx(1, rel=1e-4)
    assert sum(ratios) / 8 < 1.5


@kinds
def test_each_group_gets_the_scale_of_least_loss(monkeypatch, weights, recipe):
    """The first group's, whose targets no earlier group has moved."""
    size, weight = recipe.layout.group_size, weights(torch.float32)(50, 2 * 96)
    factor = feedback_factor(correlated(192), damping=0.3)
    first = slice(None), slice(size)
    rows = prepare_rows(weight, prepare_matrix(weight, recipe, "x"), recipe)

    def loss_of_first(values: Tensor) -> Tensor:
        remains = (rows.target.flatten(1) - values.flatten(1))[first] @ factor.effects[:size, :size]
        return (remains.square() * factor.importance[:size]).sum(1)

    losses = []
    for shrink in SHRINKS:
        monkeypatch.setattr("offline_quantize.method.encode.SHRINKS", (shrink,))
        losses.append(loss_of_first(encode_rows(rows, recipe, factor).codes.values))
    monkeypatch.setattr("offline_quantize.method.encode.SHRINKS", SHRINKS)
    ours = loss_of_first(encode_rows(rows, recipe, factor).codes.values)
    torch.testing.assert_close(ours, torch.stack(losses).amin(0))
    assert float(ours.mean()) < float(losses[0].mean())


def both_ways(monkeypatch, weight, recipe, inputs):
    """Packed tensors by the compiled search and by torch."""
    native = encode(weight, recipe, "x", inputs).tensors
    with monkeypatch.context() as patch:
        patch.setattr(feedback, "_native", lambda: None)
        slow = encode(weight, recipe, "x", inputs).tensors
    return native, slow


@kinds
@pytest.mark.parametrize("shape", [(1, 32), (17, 160)], ids=str)
def test_compiled_and_torch_agree_bit_for_bit(monkeypatch, weights, recipe, shape):
    weight, hessian = weights(torch.float32)(*shape), correlated(shape[1])
    native, slow = both_ways(monkeypatch, weight, recipe, known(hessian))
    for suffix, tensor in native.items():
        assert torch.equal(tensor, slow[suffix]), suffix


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="this processor lacks x86")
@pytest.mark.parametrize("isa", ["x86-64", "x86-64-v3"])
def test_every_isa_gives_the_same_codes(monkeypatch, tmp_path, weights, isa):
    weight, inputs = weights(torch.float32)(40, 224), known(correlated(224))
    names = "balanced-3", "paper-4"
    native = {name: encode(weight, RECIPES[name], "x", inputs).tensors for name in names}
    flags = tuple(f"-march={isa}" if f == "-march=native" else f for f in build.FLAGS)
    library = build.Library("feedback", (build.Unit(feedback.SOURCE, flags),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = build.load_library(library)
    monkeypatch.setattr(feedback, "_native", lambda: other)
    for name in names:
        for suffix, tensor in encode(weight, RECIPES[name], "x", inputs).tensors.items():
            assert torch.equal(tensor, native[name][suffix]), (name, suffix)


@pytest.mark.parametrize("name", ["balanced-3", "paper-4", "rtn-3", "both"])
@pytest.mark.parametrize("case", ["dead inputs", "zeros", "spikes", "equal", "few tokens", "large"])
def test_hostile_cases_agree_too_and_stay_finite(monkeypatch, weights, name, case):
    recipe = KINDS[name]
    weight, hessian = weights(torch.float32)(18, 96), correlated(96)
    if case == "dead inputs":
        weight[:, 3:40] = 0
        hessian[30:70], hessian[:, 30:70] = 0, 0
    elif case == "zeros":
        weight[::2, :64] = 0
        hessian.zero_()
    elif case == "spikes":
        weight[::3, ::50] = 30
    elif case == "equal":
        weight.fill_(0.5)
    elif case == "few tokens":
        hessian = correlated(96, tokens=2)
    else:
        weight, hessian = 1e5 * weight, 1e30 * hessian
    native, slow = both_ways(monkeypatch, weight, recipe, known(hessian))
    for suffix, tensor in native.items():
        assert torch.equal(tensor, slow[suffix]), suffix
    assert bool(reference.dequantize(native, recipe.layout, 96).isfinite().all())


@pytest.mark.parametrize("shape", [(130, 96), (15, 352)], ids=str)
@pytest.mark.parametrize("name", ["balanced-4", "paper-3"])
def test_many_rows_and_columns_agree_too(monkeypatch, weights, name, shape):
    weight, hessian = weights(torch.float32)(*shape), correlated(shape[1])
    native, slow = both_ways(monkeypatch, weight, RECIPES[name], known(hessian))
    for suffix, tensor in native.items():
        assert torch.equal(tensor, slow[suffix]), suffix


@pytest.mark.parametrize("name", ["balanced-3", "paper-3"])
def test_every_tensor_is_made_on_the_device_of_the_weight(monkeypatch, weights, name):
    weight, inputs = weights(torch.float32)(6, 160), known(correlated(160))
    expected = encode(weight, RECIPES[name], "x", inputs).tensors
    with torch.device("meta"):  # whatever took its device from there could not be computed with
        for found in both_ways(monkeypatch, weight, RECIPES[name], inputs):
            assert all(torch.equal(found[suffix], tensor) for suffix, tensor in expected.items())


def test_rows_do_not_depend_on_each_other(weights):
    weight, inputs = weights(torch.float32)(300, 160), known(correlated(160))
    recipe = with_layout("balanced-4", column_scale=False)
    whole = encode(weight, recipe, "x", inputs).tensors
    for part in (slice(1), slice(120, 150), slice(299, 300)):
        alone = encode(weight[part], recipe, "x", inputs).tensors
        for suffix, tensor in alone.items():
            assert torch.equal(tensor, whole[suffix][part]), suffix


def test_a_hessian_that_is_not_finite_is_refused(weights):
    for value in (torch.nan, torch.inf):
        hessian = correlated(96)
        hessian[4, 5] = value
        with pytest.raises(SourceError, match=r"^file: q: the Hessian of its inputs has .*; .*"):
            encode(weights()(8, 96), RECIPES["balanced-4"], "file: q", known(hessian))


def test_without_a_compiler_torch_encodes_and_says_so(monkeypatch, weights):
    def refuse(_):
        raise build.BuildError("no compiler today")

    weight, inputs = weights(torch.float32)(4, 96), known(correlated(96))
    feedback._native.cache_clear()
    monkeypatch.setattr(build, "load", refuse)
    try:
        with pytest.warns(UserWarning, match="will be slow: no compiler today"):
            slow = encode(weight, RECIPES["rtn-4"], "x", inputs).tensors
    finally:
        feedback._native.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = encode(weight, RECIPES["rtn-4"], "x", inputs).tensors
    assert all(torch.equal(slow[suffix], fast[suffix]) for suffix in fast)


@pytest.mark.slow
def test_the_kernels_of_a_gpu_are_those_of_torch_under_the_interpreter(run_suite):
    suite = pathlib.Path(__file__).with_name("interpreted_feedback_suite.py")
    run_suite(["-m", "pytest", suite], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_a_gpu_takes_triton_where_it_can(monkeypatch):
    monkeypatch.setattr(feedback, "has_triton", lambda: True)
    monkeypatch.setattr(feedback, "encode_torch", lambda _: "torch")
    module = SimpleNamespace(encode_triton=lambda _: "triton")
    monkeypatch.setitem(sys.modules, "offline_quantize.method.feedback_triton", module)
    target = SimpleNamespace(device=torch.device("cuda"))

    def taken(recipe, columns=64):
        task = SimpleNamespace(target=target, layout=RECIPES[recipe].layout, columns=columns)
        return feedback._search(task)

    assert taken("balanced-3") == "triton"
    assert taken("balanced-3", 72) == taken("rtn-3") == "torch"
    monkeypatch.setattr(feedback, "has_triton", lambda: False)
    assert taken("balanced-3") == "torch"
