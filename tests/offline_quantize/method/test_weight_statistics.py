import math

import pytest
import torch

from offline_quantize.method.weight_statistics import Statistics, relative_error


def summary(original, quantized, blocks=1, salient=0, overflow=0):
    statistics = Statistics(float(original.abs().max()), original.device)
    rows = original.shape[0] // blocks
    for i in range(blocks):
        part = slice(i * rows, (i + 1) * rows)
        statistics.add(original[part], quantized[part], salient, overflow)
    return statistics.summary()


def test_nothing_changed(weights):
    weight = weights(torch.float32)(64, 64)
    found = summary(weight, weight)
    assert found["relative_error"] == 0
    assert found["kl"] == 0
    assert found["entropy_before"] == found["entropy_after"] > 4


def test_known_numbers():
    original = torch.tensor([[1.0, -1.0, 0.5, -0.5]])
    found = summary(original, torch.tensor([[1.0, -1.0, 0.5, 0.5]]), salient=1, overflow=2)
    assert found["relative_error"] == pytest.approx(1 / 2.5)
    assert found["entropy_before"] == 2
    assert found["entropy_after"] == 1.5
    assert found["salient_share"] == 0.25
    assert found["salient_overflow"] == 2
    p = [1.5 / 132] * 4 + [0.5 / 132] * 252
    q = [1.5 / 132] * 2 + [2.5 / 132, 0.5 / 132] + [0.5 / 132] * 252
    assert found["kl"] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_blocks_add_up(weights):
    weight = weights(torch.float32)(64, 64)
    noisy = weight + 0.01 * weights(torch.float32, seed=1)(64, 64)
    whole, parts = summary(weight, noisy), summary(weight, noisy, blocks=8)
    assert parts == pytest.approx(whole)


def test_uniform_weights_have_all_the_entropy_there_is():
    weight = torch.linspace(-1, 1, 4096).view(64, 64)
    assert summary(weight, weight)["entropy_before"] == pytest.approx(8, abs=0.01)


def test_zeros():
    zeros = torch.zeros(4, 32)
    found = summary(zeros, zeros)
    assert (found["relative_error"], found["kl"], found["entropy_before"]) == (0, 0, 0)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e19, 1e37])
def test_weights_of_any_size(weights, size):
    weight = 10 * weights(torch.float32)(64, 64)
    noisy = weight + 0.01 * weights(torch.float32, seed=1)(64, 64)
    expected = summary(weight, noisy)
    assert summary(weight * size, noisy * size) == pytest.approx(expected, rel=0.02, abs=1e-3)
    error = relative_error(weight * size, noisy * size)
    assert error == pytest.approx(expected["relative_error"], rel=0.02)


def test_relative_error_of_zeros_and_of_nothing():
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
