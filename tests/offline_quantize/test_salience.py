import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_quantize.salience import largest_positions, penalty_for_share, soft_threshold


def test_the_soft_threshold_of_the_paper():
    weight = torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0, 4.0])
    expected = [0.0, 0.0, 0.0, 0.0, -1.5, 3.75]  # sign(w) * max(|w| - 1 / |w|, 0)
    assert soft_threshold(weight, 1.0).tolist() == expected
    assert soft_threshold(weight, 0.0).tolist() == weight.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.08, 0.5, 0.99])
def test_the_penalty_makes_as_many_weights_salient_as_it_may(weights, dtype, share):
    weight = weights(dtype)(60, 200)
    penalty = penalty_for_share(weight, share)
    salient = int((soft_threshold(weight.float(), penalty) != 0).sum())
    allowed = int(share * weight.numel())
    assert salient <= allowed
    magnitude = weight.float().abs().flatten().sort(descending=True).values
    smallest = magnitude[:salient].min() if salient else torch.inf
    if salient < allowed:  # only because the next ones are all alike
        alike = int((magnitude == magnitude[salient]).sum())
        assert salient + alike > allowed
    assert smallest**2 > penalty >= magnitude[salient] ** 2 * (1 - 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_tensors_have_no_salient_weights(dtype, value):
    weight = torch.full((4, 64), value, dtype=dtype)
    penalty = penalty_for_share(weight, 0.08)
    assert not soft_threshold(weight.float(), penalty).any()


@given(scores=st.lists(st.integers(-3, 9), min_size=1, max_size=20), count=st.integers(0, 12))
def test_largest_positions(scores, count):
    positions = largest_positions(torch.tensor([scores]).float(), count)[0].tolist()
    assert len(positions) == count
    used = [position for position in positions if position >= 0]
    assert positions == sorted(used) + [-1] * (count - len(used))
    assert len(set(used)) == len(used) == min(count, sum(score > 0 for score in scores))
    chosen = sorted((scores[position] for position in used), reverse=True)
    assert chosen == sorted(scores, reverse=True)[: len(used)]
