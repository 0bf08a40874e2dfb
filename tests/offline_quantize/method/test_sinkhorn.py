import pytest
import torch

from offline_quantize.method.sinkhorn import column_scale


def test_an_even_weight_needs_no_scale():
    assert torch.equal(column_scale(torch.ones(8, 64), 8), torch.ones(1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_come_out_even(weights, dtype):
    make = weights(torch.float32)
    spread = torch.exp(make(1, 96) * 15)
    weight = (make(512, 96) * spread).to(dtype)
    scale = column_scale(weight, 8)
    assert scale.shape == (1, 96)
    assert torch.equal(scale, scale.half().float())
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-3)
    before, after = (w.square().mean(0).sqrt() for w in (weight.float(), weight.float() / scale))
    assert after.max() / after.min() < 0.2 * before.max() / before.min()


def test_columns_and_rows_of_zeros(weights):
    weight = weights()(64, 64)
    weight[:, 3] = 0
    weight[5] = 0
    assert column_scale(weight, 8).isfinite().all()
    assert torch.equal(column_scale(torch.zeros(4, 32), 8), torch.ones(1, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weight_stays_as_it_is(weights, dtype):
    weight = weights(dtype)(64, 64)
    before = weight.clone()
    column_scale(weight, 4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-21, 1e-16])
@pytest.mark.parametrize("count", [1, 2, 32])
def test_columns_and_rows_that_are_nearly_zero_count_as_zeros(weights, size, count):
    weight, zero = weights(torch.float32)(64, 64), weights(torch.float32)(64, 64)
    weight[:, :count] *= 50 * size
    weight[5] *= 50 * size
    zero[:, :count] = 0
    zero[5] = 0
    assert torch.equal(column_scale(weight, 4), column_scale(zero, 4))


def test_a_power_of_two_in_the_weight_changes_nothing(weights):
    weight = weights(torch.float32)(64, 64)
    for exponent in (-8, 20, 100):
        assert torch.equal(column_scale(weight * 2.0**exponent, 4), column_scale(weight, 4))


@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-12])
def test_weights_below_float16_share_their_exponent_with_the_column_scale(weights, size):
    weight = weights(torch.float32)(64, 64)
    small = weight * size
    scale = column_scale(small, 4)
    row = (small / scale).abs().amax()
    assert 2**-20 < row / scale.mean() < 2**7
    assert (scale / scale.mean() - column_scale(weight, 4)).abs().max() < 0.1
