"""The block-diagonal experiment computes with the matrices that it says."""

import pytest
import torch

SIZE = 32
TRANSFORMS = ("none", "random rotation", "LogSumExp, orthogonal", "expected error, invertible")


@pytest.fixture
def block_diagonal(load):
    return load("block_diagonal")


@pytest.fixture
def weight():
    made = torch.randn(24, 160)
    made[3, 40] = 30  # one large weight makes its group coarse
    return made


def test_the_product_with_m_is_that_of_the_whole_matrix(block_diagonal):
    transform = torch.randn(5, SIZE, SIZE)
    x = torch.randn(7, 160)
    expected = x @ torch.block_diag(*transform).T
    assert torch.allclose(block_diagonal.multiplied(x, transform), expected, atol=1e-4)


def test_without_rounding_nothing_changes(block_diagonal, weight):
    parts = block_diagonal.blocks(weight, SIZE)
    assert parts.shape == (5, 24, SIZE)
    assert torch.equal(block_diagonal.joined(parts), weight)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_inputs_meet_is_near_the_weight(block_diagonal, weight, transform):
    found = block_diagonal.matrices(weight, transform, "balanced-5", SIZE, 10)
    assert (found is None) == (transform == "none")
    effective = block_diagonal.rounded(weight, found, "balanced-5", SIZE)
    error = float((effective - weight).square().sum() / weight.square().sum())
    assert 0 < error < 0.01


def test_learning_lowers_the_largest_weights(block_diagonal, weight):
    def largest(transform):
        parts = block_diagonal.blocks(weight, SIZE) @ torch.linalg.inv(transform)
        return float(block_diagonal.log_sum_exp(block_diagonal.joined(parts), 1.0))

    identity = torch.eye(SIZE).repeat(5, 1, 1)
    rotation = block_diagonal.learn(weight, SIZE, None, True, 30)
    assert torch.allclose(rotation @ rotation.mT, identity, atol=1e-5)
    assert largest(rotation) < 0.9 * largest(identity)
    assert largest(block_diagonal.learn(weight, SIZE, None, False, 30)) < 0.9 * largest(identity)


def test_learning_lowers_the_error_of_rounding(block_diagonal, weight):
    used = block_diagonal.RECIPES["rtn-3"]
    errors = []
    for found in (None, block_diagonal.learn(weight, SIZE, used, False, 60)):
        effective = block_diagonal.rounded(weight, found, "rtn-3", SIZE)
        errors.append(float((effective - weight).square().sum()))
    assert errors[1] < 0.9 * errors[0]
