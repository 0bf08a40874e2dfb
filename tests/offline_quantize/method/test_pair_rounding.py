"""Alternating rounding: its targets are least-squares solutions, and its best pair is kept."""

import pytest
import torch

from offline_quantize.method.pair_rounding import (
    output_target,
    product_error,
    round_pair,
    unpacked,
    value_target,
)
from offline_quantize.method.recipes import RECIPES

HEADS, QUERIES, SIZE, INPUTS, OUTPUTS = 2, 2, 16, 160, 40


@pytest.fixture
def pair():
    return torch.randn(HEADS * SIZE, INPUTS), torch.randn(OUTPUTS, HEADS * QUERIES * SIZE)


@pytest.fixture
def rounded(pair):
    return [weight + 0.2 * torch.randn(weight.shape) for weight in pair]


def parts(value, output):
    """W_v and W_o of each query head."""
    for head in range(HEADS * QUERIES):
        read = head // QUERIES
        yield (
            value[read * SIZE : (read + 1) * SIZE].double(),
            output[:, head * SIZE : (head + 1) * SIZE].double(),
        )


def slow_error(pair, rounded, inputs):
    """From the products themselves; inputs: a square root of E[x·xᵀ]."""
    noise = signal = 0.0
    for (value, output), (other_value, other_output) in zip(
        parts(*pair), parts(*rounded), strict=True
    ):
        signal += float((output @ value @ inputs).square().sum())
        noise += float(((output @ value - other_output @ other_value) @ inputs).square().sum())
    return noise / signal


def moments(kind):
    """Inputs as `round_pair` takes them, and a square root of their E[x·xᵀ]."""
    if kind == "alike":
        return None, torch.eye(INPUTS).double()
    if kind == "mean squares":
        mean_square = torch.rand(INPUTS) + 0.1
        return mean_square, mean_square.double().sqrt().diag()
    samples = torch.randn(INPUTS, 3 * INPUTS).double()
    return samples @ samples.T, samples


@pytest.mark.parametrize("kind", ["alike", "mean squares", "second moments"])
def test_error_of_the_product(pair, rounded, kind):
    inputs, root = moments(kind)
    expected = slow_error(pair, rounded, root)
    assert product_error(pair, tuple(rounded), HEADS, inputs) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["alike", "mean squares", "second moments"])
def test_target_of_the_output_weight(pair, rounded, kind):
    inputs, root = moments(kind)
    target = output_target(*pair, rounded[0], HEADS, inputs)
    for (value, output), (other, found) in zip(
        parts(*pair), parts(rounded[0], target), strict=True
    ):
        # W·(Ŵ_v·R) = W_o·W_v·R in least squares
        solved = torch.linalg.lstsq((other @ root).T, (output @ value @ root).T).solution.T
        assert torch.allclose(found, solved, atol=1e-4)


def test_target_of_the_value_weight(pair, rounded):
    target = value_target(*pair, rounded[1], HEADS)
    every, found = list(parts(*pair)), list(parts(target, rounded[1]))
    for read in range(HEADS):
        heads = range(read * QUERIES, (read + 1) * QUERIES)
        wanted = torch.cat([every[head][1] @ every[head][0] for head in heads])
        stacked = torch.cat([found[head][1] for head in heads])
        solved = torch.linalg.lstsq(stacked, wanted).solution
        assert torch.allclose(found[heads[0]][0], solved, atol=1e-4)


def test_damping_pulls_targets_to_the_original(pair, rounded):
    value, output = pair
    near = output_target(value, output, rounded[0], HEADS, damping=1e6)
    assert torch.allclose(near, output, atol=1e-4)
    assert torch.allclose(value_target(*pair, rounded[1], HEADS, damping=1e6), value, atol=1e-4)


def test_a_head_of_zeros_has_a_target(pair, rounded):
    rounded[0][:SIZE] = 0
    target = output_target(*pair, rounded[0], HEADS)
    assert target.isfinite().all()
    assert not target[:, : QUERIES * SIZE].any()


@pytest.mark.parametrize("recipe", ["rtn-3", "balanced-3", "rtn-4"])
def test_rounding_keeps_the_best_pair(pair, recipe):
    used = RECIPES[recipe]
    found = round_pair(*pair, HEADS, used, used, rounds=2)
    both = unpacked(found.value, pair[0]), unpacked(found.output, pair[1])
    assert len(found.errors) == 5
    assert slow_error(pair, both, torch.eye(INPUTS).double()) == pytest.approx(
        min(found.errors), rel=1e-3
    )
    assert min(found.errors) < 0.97 * found.errors[0]


def test_no_round_is_plain_rounding(pair):
    used = RECIPES["rtn-4"]
    found = round_pair(*pair, HEADS, used, used, rounds=0)
    assert len(found.errors) == 1
