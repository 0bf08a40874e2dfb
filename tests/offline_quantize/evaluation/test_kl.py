"""The KL estimate against the exact sum, and the text it is measured on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize.evaluation import kl
from offline_quantize.evaluation.kl import (
    compare,
    generate_text,
    reference_distributions,
    text_windows,
)
from offline_quantize.evaluation.models import load_original, load_tokenizer

BEGIN = 256
Tables = Callable[..., tuple[Any, Any, Tensor]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tables(bigram: Callable[[Tensor], Any]) -> Tables:
    """Makes an original, a disturbed copy of it, and a text of both."""

    def make(size: int = 200) -> tuple[Any, Any, Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(size, size, generator=generator)
        other = logits + 0.4 * torch.randn(size, size, generator=generator)
        return bigram(logits), bigram(other), torch.randint(size, (400,), generator=generator)

    return make


def exact(original: Any, other: Any, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p/q [T, vocabulary] and KL [T], in float64."""
    p, q = (model.table[window[:-1]].double().log_softmax(1) for model in (original, other))
    return p.exp(), p - q, (p.exp() * (p - q)).sum(1)


def test_all_tokens_kept_is_the_direct_computation(tables: Tables) -> None:
    original, other, window = tables()
    found = compare(
        reference_distributions(original, [window[:150], window[149:]], top=500),
        other,
        [window[:150], window[149:]],
    )
    _, _, kl = exact(original, other, window)
    # float32: 200 terms of p·log p/q, each off by a few eps of its logarithms
    torch.testing.assert_close(found.kl.double(), kl, rtol=0, atol=200**0.5 * 16 * 2**-23)
    summary = found.summary("the text", 150)
    assert (summary.of, summary.window) == ("the text", 150)
    loss = torch.nn.functional.cross_entropy(other.table[window[:-1]].double(), window[1:])
    assert summary.tokens == 399
    assert summary.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert summary.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)
    assert summary.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    same = original.table.argmax(1) == other.table.argmax(1)
    assert summary.agreement == pytest.approx(float(same[window[:-1]].float().mean()))
    assert summary.tail_mass == 0


def test_kept_tokens_and_draws_have_no_bias(tables: Tables) -> None:
    original, other, window = tables(size=1000)
    draws, top = 2000, 20
    reference = reference_distributions(original, [window], top, draws)
    p, ratio, kl = exact(original, other, window)
    found = compare(reference, other, [window]).kl.double()

    tail = p.scatter(1, reference.tokens.long(), 0)
    mass = tail.sum(1)
    torch.testing.assert_close(reference.tail_log_mass.exp().double(), mass, rtol=1e-5, atol=1e-7)
    assert mass.mean() > 0.2  # the draws matter here
    centre = (tail * ratio).sum(1) / mass
    spread = ((tail * (ratio - centre[:, None]).square()).sum(1) / mass).sqrt()
    noise = mass * spread / draws**0.5
    assert bool(((found - kl).abs() < 5 * noise + 1e-5).all())
    assert abs(float((found - kl).mean())) < 4 * float(noise.square().sum().sqrt()) / len(kl)
    without = (p * ratio - tail * ratio).sum(1)  # what dropping the others would give
    assert abs(float((without - kl).mean())) > 0.01


def test_few_draws_are_right_on_average(tables: Tables) -> None:
    original, other, window = tables(size=1000)
    window = window.repeat(4)
    _, _, kl = exact(original, other, window)
    found = compare(reference_distributions(original, [window], 20), other, [window]).kl
    assert float(found.mean()) == pytest.approx(float(kl.mean()), rel=0.05)


def test_tokens_without_any_mass(tables: Tables, bigram: Callable[[Tensor], Any]) -> None:
    """Padded vocabularies have logits of -inf; nothing becomes NaN."""
    original, other, window = tables()
    for model in (original, other):
        model.table[:, 30:] = -torch.inf
    window = window % 30
    found = compare(reference_distributions(original, [window], top=50), other, [window])
    _, _, kl = exact(bigram(original.table[:, :30]), bigram(other.table[:, :30]), window)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-5)


def test_ties_agree(bigram: Callable[[Tensor], Any]) -> None:
    tied = torch.zeros(4, 4)
    window = torch.tensor([0, 1, 2, 3])
    assert bool(
        compare(
            reference_distributions(bigram(tied), [window]), bigram(tied), [window]
        ).agreement.all()
    )
    other = torch.zeros(4, 4)
    reference = reference_distributions(bigram(tied), [window])
    other[:, int(reference.tokens[0, 0])] = -1
    assert not bool(compare(reference, bigram(other), [window]).agreement.any())


def test_a_model_against_itself(source: Path, text: Path) -> None:
    model = load_original(source, torch.bfloat16, "cpu")
    windows = text_windows(load_tokenizer(source), [text], 500, 128)
    found = compare(reference_distributions(model, windows, top=16), model, windows)
    assert found.kl.abs().max() == 0
    assert bool(found.agreement.all())
    assert found.loss.equal(found.original_loss)


def test_windows_begin_like_a_text_and_hold_all_of_it(source: Path, text: Path) -> None:
    whole = text.read_text()
    windows = text_windows(load_tokenizer(source), [text, text], len(whole) + 30, 100)
    assert {len(window) for window in windows[:-1]} == {100}
    assert all(int(window[0]) == BEGIN for window in windows)
    tokens = torch.cat([window[1:] for window in windows]).tolist()
    spelled = load_tokenizer(source).decode(tokens)
    assert spelled == whole + whole[:30]


def test_tokens_are_drawn_by_their_probabilities_from_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.zeros(2 * kl.RUN + 9)
    share[[3, 255, 256, 300, 511, 520]] = torch.tensor([0.3, 0.1, 0.2, 0.05, 0.05, 0.3])
    found = kl._draw(share.expand(20_000, -1), generator)
    assert found.shape == (20_000, 1)
    counts = found.flatten().bincount(minlength=len(share)) / 20_000
    assert bool(((counts - share).abs() <= 4.5 * (share * (1 - share) / 20_000).sqrt()).all())


def test_a_place_behind_the_last_probability_is_in_it() -> None:
    p = torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    found, place = kl._invert(p, torch.tensor([[0.75], [0.9]], dtype=torch.float64))
    assert found.tolist() == [[1], [2]]
    assert place[:, 0].tolist() == pytest.approx([0.5, 0.5])
    found, place = kl._invert(p, torch.tensor([[0.25], [0.0]], dtype=torch.float64))
    assert (found.tolist(), place.tolist()) == ([[1], [2]], [[0.0], [0.0]])


def test_the_original_writes_from_its_own_distribution(bigram: Callable[[Tensor], Any]) -> None:
    share = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
    model = bigram(share.log())
    windows = generate_text(model, 20_000, window=500)
    assert (len(windows), {len(window) for window in windows}) == (40, {500})
    assert {int(window[0]) for window in windows} == {0}
    counts = torch.zeros(3, 3)
    for window in windows:
        counts.index_put_((window[:-1], window[1:]), torch.ones(499), accumulate=True)
    found = counts / counts.sum(1, keepdim=True)
    noise = (share * (1 - share) / counts.sum(1, keepdim=True)).sqrt()
    assert bool(((found - share).abs() < 4.5 * noise).all())
    again = torch.stack(generate_text(model, 20_000, window=500))
    assert torch.stack(windows).equal(again)
    assert not torch.stack(generate_text(model, 20_000, window=500, seed=1)).equal(again)
