"""The factor of the Hessian: it is one, of the right side, and there always is one."""

import pytest
import torch
from random_hessians import correlated
from torch import Tensor

from offline_quantize.method.feedback_factor import ROWS, feedback_bytes, feedback_factor


def damped(hessian: Tensor, scale: Tensor, damping: float) -> Tensor:
    matrix = hessian.double() * scale.double().T * scale.double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)).double()


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("size", [1, 32, ROWS + 44])
def test_the_factor_gives_back_the_damped_hessian(size, damping):
    hessian, scale = correlated(size), torch.rand(1, size) + 0.5
    factor = feedback_factor(hessian, scale, damping)
    assert torch.equal(factor.effects, factor.effects.triu())
    assert bool((factor.effects.diagonal() == 1).all())
    assert float(factor.importance.mean()) == pytest.approx(1)
    assert bool((factor.importance > 0).all())
    effects = factor.effects.double()
    found = effects * factor.importance.double() @ effects.T
    wanted = damped(hessian, scale, damping)
    torch.testing.assert_close(found / found.trace(), wanted / wanted.trace(), atol=1e-6, rtol=1e-4)


def test_its_recursion_is_that_of_gptq():
    """One by one: an error (target − value) / U[k, k] times row k of U is taken off later targets.

    A mirrored factor (V·Vᵀ for Vᵀ·V) passes for one until its targets are compared.
    """
    size, damping = 24, 0.1
    hessian, weight = correlated(size), torch.randn(size).double()
    values = (4 * weight).round() / 4
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, torch.ones(1, size), damping)))
    upper = upper.T  # upperᵀ · upper = H⁻¹
    target, targets = weight.clone(), []
    for k in range(size):
        targets.append(target[k].clone())
        target[k:] -= (target[k] - values[k]) / upper[k, k] * upper[k, k:]
    effects = feedback_factor(hessian, damping=damping).effects.double()
    ours = weight + (weight - values) @ (effects - torch.eye(size))
    torch.testing.assert_close(ours, torch.stack(targets), atol=1e-5, rtol=1e-4)
    mirrored = torch.linalg.cholesky(damped(hessian, torch.ones(1, size), damping)).T
    wrong = weight + (weight - values) @ (mirrored / mirrored.diagonal() - torch.eye(size))
    assert float((wrong - torch.stack(targets)).abs().max()) > 0.05


def test_the_loss_is_the_sum_over_what_remains_at_each_target():
    hessian, error = correlated(40), torch.randn(7, 40)
    factor = feedback_factor(hessian, damping=0.5)
    remains = error @ factor.effects
    wanted = ((error.double() @ damped(hessian, torch.ones(1, 40), 0.5)) * error).sum(1)
    found = (remains.square() * factor.importance).sum(1)
    torch.testing.assert_close(found / found.sum(), (wanted / wanted.sum()).float())


def test_zeros_and_equal_inputs_give_the_identity():
    for hessian in (torch.zeros(32, 32), torch.eye(32), 1e30 * torch.eye(32)):
        factor = feedback_factor(hessian)
        assert torch.equal(factor.effects, torch.eye(32))
        assert torch.equal(factor.importance, torch.ones(32))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_every_hessian_gets_a_factor(size):
    few = correlated(64, tokens=3)  # of rank 3
    dead = correlated(64)
    dead[5], dead[:, 5] = 0, 0
    indefinite = torch.randn(64, 64)
    for hessian in (few, dead, indefinite + indefinite.T + 20 * torch.eye(64), torch.ones(64, 64)):
        for damping in (0.0, 1e-8, 1.0):
            factor = feedback_factor(size * hessian, damping=damping)
            assert bool(factor.effects.isfinite().all())
            assert bool(factor.importance.isfinite().all())
    negative = feedback_factor(-torch.eye(4))  # no loss is negative: as if nothing were known
    assert torch.equal(negative.effects, torch.eye(4))


def test_the_hessian_stays_as_it_is():
    hessian, scale = correlated(32).double(), torch.rand(1, 32)
    before = hessian.clone()
    feedback_factor(hessian)
    feedback_factor(hessian, scale)
    assert torch.equal(hessian, before)


def test_it_takes_no_more_memory_than_it_says():
    hessian = correlated(1024)
    with torch.profiler.profile(profile_memory=True) as profile:
        factor = feedback_factor(hessian, torch.rand(1, 1024) + 0.5)
    changes = [(event.time_range.start, event.self_cpu_memory_usage) for event in profile.events()]
    total = peak = hessian.nbytes
    for _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    assert total >= hessian.nbytes + factor.effects.nbytes
    assert peak <= 1.3 * feedback_bytes(1024)  # and a piece of ROWS rows
