"""Tuned scales: what is trained is the divergence, and known factors are found again."""

import copy
import itertools

import pytest
import torch
from tiny_models import random_llama

from offline_quantize.calibration import scale_tuning

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture
def model():
    model = random_llama(**SIZES, tie_word_embeddings=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # distributions that are far from even
    return model


def linear_layers(model):
    return [f"model.{n}" for n, m in model.model.named_modules() if hasattr(m, "in_features")]


def text(count, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(SIZES["vocab_size"], (count, length), generator=generator))


def mean_divergence(one, other, windows):
    with torch.no_grad():
        return float(
            sum(scale_tuning.divergence(one, other, window[None]) for window in windows)
            / len(windows)
        )


def test_divergence_is_the_mean_over_predicted_tokens(model):
    other = random_llama(seed=1, **SIZES).eval()
    tokens = torch.stack(text(3, 5))
    total = 0.0
    for row in tokens:
        p, q = (m(row[None]).logits[0].double().softmax(-1) for m in (model, other))
        for position in range(4):
            total += sum(a * (a / b).log() for a, b in zip(p[position], q[position], strict=True))
    found = scale_tuning.divergence(model, other, tokens)
    torch.testing.assert_close(found.double(), total / 12, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_scaled_layer_is_the_layer_of_the_scaled_weight(bias):
    layer = scale_tuning.ScaledLinear(torch.nn.Linear(5, 7, bias=bias))
    layer.row.data, layer.column.data = torch.rand(7), torch.rand(5)
    weight = layer.row[:, None] * layer.frozen.weight * layer.column
    x = torch.randn(2, 3, 5)
    expected = torch.nn.functional.linear(x, weight, layer.frozen.bias)
    torch.testing.assert_close(layer(x), expected)


def test_factors_that_were_taken_off_are_found_again(model):
    quantized, names = copy.deepcopy(model), linear_layers(model)
    with torch.no_grad():
        for name in names:
            weight = quantized.get_submodule(name).weight
            weight *= 1 + 0.1 * torch.randn(len(weight), 1)
            weight *= 1 + 0.1 * torch.randn(weight.shape[1])
    held_out = text(4, seed=1)
    before = mean_divergence(model, quantized, held_out)
    factors = scale_tuning.tune_factors(model, quantized, names, text(64), epochs=8, rate=0.01)
    assert mean_divergence(model, quantized, held_out) == before  # nothing was changed
    with torch.no_grad():
        for name in names:
            weight = quantized.get_submodule(name).weight
            weight *= factors[name].row[:, None] * factors[name].column
    assert mean_divergence(model, quantized, held_out) < before / 5


def test_models_stay_as_they_were_and_every_step_is_reported(model):
    quantized = random_llama(seed=1, **SIZES).eval()
    quantized.model.norm.weight.requires_grad_(False)
    steps, names = [], linear_layers(model)
    before = {name: (p.requires_grad, p.clone()) for name, p in quantized.named_parameters()}
    windows = text(3)
    scale_tuning.tune_factors(
        model, quantized, names, windows, epochs=2, report=lambda *step: steps.append(step)
    )
    assert [step[:2] for step in steps] == [(done + 1, 6) for done in range(6)]
    first = [mean_divergence(model, quantized, [window]) for window in windows]
    assert any(steps[0][2] == pytest.approx(kl, rel=1e-4) for kl in first)
    after = dict(quantized.named_parameters())
    assert after.keys() == before.keys()
    for name, (required, value) in before.items():
        assert after[name].requires_grad == required
        assert torch.equal(after[name], value)
        assert after[name].grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_seed_gives_the_same_factors(model):
    quantized, names = random_llama(seed=1, **SIZES).eval(), linear_layers(model)[:2]

    def factors(seed):
        found = scale_tuning.tune_factors(model, quantized, names, text(4), epochs=1, seed=seed)
        return torch.cat([part for f in found.values() for part in (f.row, f.column)])

    assert torch.equal(factors(0), factors(0))
    assert not torch.equal(factors(0), factors(1))


def test_windows_may_be_taken_several_at_a_time(model):
    quantized, names = random_llama(seed=1, **SIZES).eval(), linear_layers(model)[:2]
    steps, windows = [], text(5)
    scale_tuning.tune_factors(
        model, quantized, names, windows, batch=2, report=lambda *step: steps.append(step)
    )
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    pairs = [mean_divergence(model, quantized, pair) for pair in itertools.combinations(windows, 2)]
    assert any(steps[0][2] == pytest.approx(kl, rel=1e-4) for kl in pairs)


def test_each_module_may_have_a_rate_of_its_own(model):
    quantized, names = random_llama(seed=1, **SIZES).eval(), linear_layers(model)[:2]
    found = scale_tuning.tune_factors(
        model, quantized, names, text(4), rate=dict(zip(names, (0.0, 0.01), strict=True))
    )
    assert torch.equal(found[names[0]].row, torch.ones_like(found[names[0]].row))
    assert not torch.equal(found[names[1]].row, torch.ones_like(found[names[1]].row))


def test_columns_may_be_left_out(model):
    quantized, names = random_llama(seed=1, **SIZES).eval(), linear_layers(model)[:2]
    found = scale_tuning.tune_factors(model, quantized, names, text(4), rows_alone=names[:1])
    moved = [[bool((part != 1).any()) for part in (f.row, f.column)] for f in found.values()]
    assert moved == [[True, False], [True, True]]
