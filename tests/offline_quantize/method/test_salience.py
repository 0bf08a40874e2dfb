"""λ' found exactly, the soft threshold as in the paper, and the selection within groups."""

import pytest
import torch

from offline_quantize.method.salience import largest_positions, penalty_for_share, soft_threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.08, 0.5, 0.999])
def test_penalty_makes_the_wanted_share_salient(dtype, share):
    weight = torch.randn((64, 96), generator=torch.Generator().manual_seed(1)).to(dtype)
    penalty = penalty_for_share(weight, share)
    salient = soft_threshold(weight.float(), penalty) != 0
    allowed = int(share * weight.numel())
    assert int(salient.sum()) <= allowed
    # exactly: the next smaller magnitude would be too many
    non_salient = weight.float().abs()[~salient]
    too_many = int((weight.float().abs() >= non_salient.max()).sum())
    assert too_many > allowed


def test_salient_are_the_largest_magnitudes():
    weight = torch.randn((32, 64), generator=torch.Generator().manual_seed(2))
    salient = soft_threshold(weight, penalty_for_share(weight, 0.1)) != 0
    assert weight.abs()[salient].min() > weight.abs()[~salient].max()


def test_soft_threshold_is_the_papers_formula():
    weight = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    shrunk = soft_threshold(weight, 2.0)
    torch.testing.assert_close(shrunk, torch.tensor([-3 + 2 / 3, 0.0, 0.0, 0.0, 2 - 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_weights_are_never_more_than_the_share(dtype):
    weight = torch.ones((8, 32), dtype=dtype)
    assert int((soft_threshold(weight.float(), penalty_for_share(weight, 0.5)) != 0).sum()) == 0
    zeros = torch.zeros((8, 32), dtype=dtype)
    assert int((soft_threshold(zeros.float(), penalty_for_share(zeros, 0.5)) != 0).sum()) == 0


def test_largest_positions_are_ascending_and_padded():
    score = torch.tensor([[3.0, 0.0, 9.0, 1.0], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest_positions(score, 2).tolist() == [[0, 2], [3, -1], [-1, -1]]
    assert largest_positions(score, 6)[0].tolist() == [0, 2, 3, -1, -1, -1]
