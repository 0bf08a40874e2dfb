import pytest
import torch

from offline_quantize.balance import column_scale


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
