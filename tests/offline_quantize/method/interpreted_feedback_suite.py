"""Error feedback on a GPU, run by `test_feedback.py` in a process of its own.

Triton decides when it is imported whether kernels are interpreted. Without TRITON_INTERPRET they
run on a GPU.
"""

import copy
import dataclasses
import os

import pytest
import torch
from random_hessians import correlated

from offline_quantize.method import encode, feedback
from offline_quantize.method.feedback_torch import encode_torch
from offline_quantize.method.feedback_triton import encode_triton
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import RECIPES, adjust

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


def both(monkeypatch, weight, recipe, hessian):
    """What was found for a weight by Triton's kernels and in torch: codes, values, scales."""
    results = []

    def search(task):
        results.extend([encode_triton(task), encode_torch(task)])
        return copy.deepcopy(results[1])  # whose codes are changed in place

    monkeypatch.setattr(feedback, "_search", search)
    monkeypatch.setattr(encode, "SHRINKS", encode.SHRINKS[::2])
    inputs = InputStatistics(hessian.diagonal().clone().to(DEVICE), hessian.to(DEVICE))
    encode.encode(weight.to(DEVICE), recipe, "x", inputs)
    return results


def assert_equal(results):
    ours, theirs = results
    for part in ("codes", "values", "chosen"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    assert bool(ours.codes.any())


def test_codes_are_those_of_torch(monkeypatch):
    """Several groups, the last one shorter, and several programs; both scales are taken."""
    recipe = adjust(RECIPES["balanced-3"], group_size=64, alpha=0.05)
    results = both(monkeypatch, torch.randn(33, 96), recipe, correlated(96))
    assert_equal(results)
    assert len(results[0].chosen.unique()) == 2


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_every_width(monkeypatch, bits):
    recipe = adjust(RECIPES[f"balanced-{bits}"], group_size=32)
    assert_equal(both(monkeypatch, torch.randn(3, 32), recipe, correlated(32)))


@pytest.mark.parametrize("grid", ["sign-magnitude", "min-max"])
def test_other_grids_of_salient_values(monkeypatch, grid):
    recipe = RECIPES["balanced-4"]
    layout = dataclasses.replace(recipe.layout, group_size=32, salient_grid=grid)
    recipe = dataclasses.replace(recipe, layout=layout)
    assert_equal(both(monkeypatch, torch.randn(3, 32), recipe, correlated(32)))


def test_spikes_and_dead_inputs(monkeypatch):
    weight, hessian = torch.randn(5, 64), correlated(64)
    weight[::3, ::20] = 30
    weight[:, 3:20] = 0
    hessian[30:40], hessian[:, 30:40] = 0, 0
    recipe = adjust(RECIPES["balanced-3"], group_size=32)
    assert_equal(both(monkeypatch, weight, recipe, hessian))
