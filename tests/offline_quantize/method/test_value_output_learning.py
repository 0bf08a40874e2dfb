"""Proxies against slow computations of the same, and what descent on them finds."""

import math

import pytest
import torch

from offline_quantize.method.encode import encode_unchecked
from offline_quantize.method.pair_rounding import product_error, unpacked
from offline_quantize.method.recipes import RECIPES
from offline_quantize.method.sinkhorn import column_scale
from offline_quantize.method.value_output import transform_output, transform_value
from offline_quantize.method.value_output_learning import cayley, learn
from offline_quantize.method.value_output_proxies import ExpectedError, LogSumExp

HEADS, QUERIES, SIZE, INPUTS, OUTPUTS = 2, 2, 16, 160, 48


@pytest.fixture
def pair():
    value = torch.randn(HEADS * SIZE, INPUTS) * torch.rand(INPUTS)
    output = torch.randn(OUTPUTS, HEADS * QUERIES * SIZE)
    output[:, 3] *= 12  # large columns make every group of their rows coarse
    value[5] *= 9
    return value, output


def expected_error(value, output, recipe, inputs):
    """Slow: group by group and head by head."""
    layout, size = recipe.layout, recipe.layout.group_size

    def variance(weight):
        scale = torch.ones(1, weight.shape[1])
        if layout.column_scale:
            scale = column_scale(weight, recipe.sinkhorn_iterations)
        result = torch.empty_like(weight, dtype=torch.float64)
        for row in range(len(weight)):
            for first in range(0, weight.shape[1], size):
                part = slice(first, first + size)
                scaled = (weight[row, part] / scale[0, part]).double()
                if layout.uniform:
                    step = (max(0, scaled.max()) - min(0, scaled.min())) / 2
                else:
                    step = scaled.abs().sort(descending=True).values[layout.salient_count]
                result[row, part] = 4**-layout.bits * step**2 * scale[0, part].double() ** 2
        return result

    total, of_value, of_output = 0.0, variance(value), variance(output)
    for head in range(HEADS * QUERIES):
        rows = slice(head // QUERIES * SIZE, head // QUERIES * SIZE + SIZE)
        columns = slice(head * SIZE, head * SIZE + SIZE)
        reach = output[:, columns].double().square()
        total += float((reach @ of_value[rows] * inputs).sum())
        total += float((of_output[:, columns] @ value[rows].double().square() * inputs).sum())
    return math.log(total)


@pytest.mark.parametrize("recipe", ["balanced-3", "balanced-4", "rtn-3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_expected_error(pair, recipe, weighted):
    inputs = torch.rand(INPUTS) if weighted else None
    proxy = ExpectedError(RECIPES[recipe], RECIPES[recipe], inputs)
    slow = expected_error(*pair, RECIPES[recipe], 1 if inputs is None else inputs.double())
    assert float(proxy(*pair, HEADS)) == pytest.approx(slow, abs=1e-3)  # t is float16 in files


def test_bits_weigh_the_two_errors_against_each_other(pair):
    fine, coarse = RECIPES["balanced-5"], RECIPES["balanced-3"]
    both = float(ExpectedError(fine, fine)(*pair, HEADS))
    one = float(ExpectedError(coarse, fine)(*pair, HEADS))
    all_coarse = float(ExpectedError(coarse, coarse)(*pair, HEADS))
    assert both < one < all_coarse


def test_log_sum_exp(pair):
    value, output = pair
    proxy = LogSumExp.of(value, output, 128)
    exponents = []
    for weight in pair:
        unit = weight.double().square().mean().sqrt()
        for row in weight.double():
            exponents += [5 * part.abs().max() / unit for part in row.split(128)]
    slow = torch.stack(exponents).logsumexp(0) / 5
    assert float(proxy(value, output, HEADS)) == pytest.approx(float(slow), rel=1e-5)


def test_cayley_matrices():
    free = 0.2 * torch.randn(2, 6, 6, dtype=torch.float64)
    identity = torch.eye(6, dtype=torch.float64)
    rotation = cayley(free - free.mT)
    assert torch.allclose(rotation @ rotation.mT, identity.expand(2, 6, 6), atol=1e-12)
    assert torch.allclose(cayley(free) @ cayley(-free), identity.expand(2, 6, 6), atol=1e-12)


@pytest.mark.parametrize("recipe", ["rtn-3", "balanced-3"])
@pytest.mark.parametrize("measure", ["LogSumExp", "ExpectedError"])
def test_learning_lowers_the_proxy_and_the_error_of_rounding(pair, measure, recipe):
    used = RECIPES[recipe]
    proxy = LogSumExp.of(*pair, 128) if measure == "LogSumExp" else ExpectedError(used, used)
    rotation = learn(*pair, HEADS, proxy, "orthogonal", 60)
    general = learn(*pair, HEADS, proxy, "invertible", 60, rotation=rotation)
    assert general.after < rotation.after < rotation.before == general.before
    identity = torch.eye(SIZE).expand(HEADS, SIZE, SIZE)
    assert torch.allclose(rotation.matrices @ rotation.matrices.mT, identity, atol=1e-5)
    assert not torch.allclose(general.matrices @ general.matrices.mT, identity, atol=1e-2)
    errors = []
    for matrices in (identity, rotation.matrices, general.matrices):
        value, output = transform_value(pair[0], matrices), transform_output(pair[1], matrices)
        assert float(proxy(value, output, HEADS)) >= general.after - 1e-3
        both = [unpacked(encode_unchecked(w, used, "weight"), w) for w in (value, output)]
        errors.append(product_error((value, output), (both[0], both[1]), HEADS))
    if recipe == "rtn-3" or measure == "ExpectedError":
        assert min(errors[1:]) < errors[0]


def test_learning_draws_nothing_at_random(pair):
    proxy = LogSumExp.of(*pair, 128)
    first = learn(*pair, HEADS, proxy, "invertible", 20)
    torch.manual_seed(7)
    again = learn(*pair, HEADS, proxy, "invertible", 20)
    assert torch.equal(first.matrices, again.matrices)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_weights_beyond_float32_stay_as_they_are(pair, factor):
    used = RECIPES["balanced-4"]
    value, output = pair[0] * factor, pair[1] * factor
    learned = learn(value, output, HEADS, ExpectedError(used, used), "invertible", 5)
    assert torch.equal(learned.matrices, torch.eye(SIZE).repeat(HEADS, 1, 1))
