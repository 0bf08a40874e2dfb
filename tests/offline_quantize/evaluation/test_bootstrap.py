import pytest
import torch

from offline_quantize.evaluation.bootstrap import mean_interval


def test_interval_of_independent_values() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    low, high = mean_interval(values)
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * 3 / 4000**0.5, rel=0.1)
    assert mean_interval(values) == (low, high)


def test_interval_of_dependent_values() -> None:
    """Runs of 32 equal values tell no more than one of each run."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).repeat_interleave(32)
    low, high = mean_interval(values, 64)
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.25)


@pytest.mark.parametrize("count", [1, 2, 9, 65, 130])
def test_interval_of_few_values(count: int) -> None:
    values = torch.arange(count).float()
    low, high = mean_interval(values, 64)
    assert 0 <= low <= float(values.mean()) <= high <= count - 1
    assert mean_interval(torch.ones(count), 64) == (1, 1)  # a shorter last block counts as such
