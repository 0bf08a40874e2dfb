"""The stages that a weight goes through: their order, their parts, and where they compute."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from no_default_device import NoDefaultDevice

from offline_quantize.method.codes import Objective
from offline_quantize.method.encode import encode, encode_groups, prepare_matrix, prepare_rows
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import RECIPES, adjust


def squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def prepared(weight: torch.Tensor, name: str):
    recipe = RECIPES[name]
    return prepare_rows(weight, prepare_matrix(weight, recipe, "x"), recipe)


@pytest.mark.parametrize("columns", [384, 352])  # 352: a ragged last group
@pytest.mark.parametrize("name", RECIPES)
def test_groups_may_be_encoded_one_by_one(weights, name, columns):
    rows, recipe = prepared(weights(torch.float32)(40, columns), name), RECIPES[name]
    whole = encode_groups(rows, recipe)
    parts = [encode_groups(rows.groups(g, g + 1), recipe) for g in range(rows.target.shape[1])]
    for field in ("base", "salient", "values"):
        found = torch.cat([getattr(part.codes, field) for part in parts], 1)
        assert torch.equal(found, getattr(whole.codes, field)), field
    for suffix, tensor in whole.scales.tensors.items():
        assert torch.equal(torch.cat([p.scales.tensors[suffix] for p in parts], 1), tensor), suffix


@pytest.mark.parametrize("name", RECIPES)
def test_codes_follow_a_target_that_moves(weights, name):
    """Error feedback replaces the target of later groups; what is settled for the row stays."""
    rows, recipe = prepared(weights(torch.float32)(16, 256), name), RECIPES[name]
    later = rows.groups(1, 2)
    moved = dataclasses.replace(later, target=later.target + 0.02)
    values = encode_groups(moved, recipe).codes.values
    old, new = (squared(values - target) for target in (later.target, moved.target))
    assert new < 0.5 * old


def test_the_objective_weighs_columns(weights):
    recipe = RECIPES["balanced-3"]
    rows = prepared(weights(torch.float32)(64, 256), "balanced-3")
    importance = torch.where(torch.arange(128) % 3 == 0, 10.0, 0.1).repeat(2, 1)

    def errors(objective):
        difference = encode_groups(rows, recipe, objective).codes.values - rows.target
        return squared(difference * importance.sqrt()), squared(difference)

    plain, weighed = errors(Objective()), errors(Objective(importance))
    assert errors(Objective(torch.ones(2, 128))) == plain
    assert weighed[0] < 0.9 * plain[0]
    assert weighed[1] > plain[1]


MANY_KINDS = (
    *((RECIPES[name], name) for name in RECIPES),
    (adjust(RECIPES["balanced-4"], alpha=0.0), "no salient weights"),
    (
        dataclasses.replace(
            RECIPES["balanced-4"],
            layout=dataclasses.replace(
                RECIPES["balanced-4"].layout,
                trellis=False,
                codebook=RECIPES["balanced-4"].layout.codebook[::2],
                salient_grid="sign-magnitude",
            ),
        ),
        "no trellis",
    ),
)
kinds = pytest.mark.parametrize(
    "recipe", [r for r, _ in MANY_KINDS], ids=[n for _, n in MANY_KINDS]
)


@kinds
@pytest.mark.parametrize("search", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_tensor_is_made_on_the_device_of_the_weight(
    monkeypatch, weights, recipe, search, dtype
):
    if search == "torch":
        monkeypatch.setattr("offline_quantize.method.trellis._native", lambda: None)
    weight = weights(dtype)(6, 160)
    with NoDefaultDevice():
        expected = encode(weight, recipe, "x")
    with torch.device("meta"):  # whatever took its device from there could not be computed with
        found = encode(weight, recipe, "x")
    for suffix, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[suffix], tensor), suffix
    assert found.statistics.summary() == expected.statistics.summary()


@pytest.mark.parametrize("name", ["balanced-4", "balanced-3", "paper-4", "rtn-4"])
def test_feedback_makes_every_tensor_on_the_device_of_the_weight(monkeypatch, weights, name):
    """The search in torch, which is that of a GPU, with statistics of the inputs."""
    monkeypatch.setattr("offline_quantize.method.feedback._native", lambda: None)
    weight, x = weights()(3, 160), torch.randn(40, 160)
    inputs = InputStatistics(x.square().mean(0), x.T @ x / 40)
    with NoDefaultDevice():
        expected = encode(weight, RECIPES[name], "x", inputs)
    with torch.device("meta"):
        found = encode(weight, RECIPES[name], "x", inputs)
    for suffix, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[suffix], tensor), suffix


def test_a_weight_goes_through_the_stages_in_their_order_once(monkeypatch, weights):
    before = ["column_scale", "penalty"]
    of_rows = ["choose_salient", "row_scales", "group_scales", "find_codes", "pack_rows", "add"]
    entered = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and Path(code.co_filename).parent.name == "method":
            entered.extend({code.co_name} & {*before, *of_rows})

    monkeypatch.setattr("offline_quantize.method.encode.BLOCK_WEIGHTS", 3 * 160)
    weight = weights()(6, 160)
    sys.setprofile(note)
    try:
        encode(weight, RECIPES["balanced-4"], "x")
    finally:
        sys.setprofile(None)
    assert entered == [*before, *of_rows, *of_rows]
