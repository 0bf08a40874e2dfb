"""The open questions' statistics, rules of salience and rows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize import dequantize_weight, list_recipes, quantize_weight

pytestmark = pytest.mark.slow

Load = Callable[[str], ModuleType]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Toy(torch.nn.Module):
    """Each token is predicted from itself, so a token's gradient is one of a weight's own."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.embedding = torch.nn.Embedding(11, 6)
        self.inner = torch.nn.Linear(6, 5, bias=False)
        self.head = torch.nn.Linear(5, 11, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.inner(inputs_embeds).tanh()))


def test_moments_are_means_over_tokens(load: Load) -> None:
    model, window = Toy(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    weight = model.inner.weight
    (found,) = load("input_moments").moments(model, {"inner.weight": weight}, [window]).values()
    x = model.embedding(window)
    assert torch.allclose(found.inputs.mean_square, x.square().mean(0))
    assert torch.allclose(found.hessian, torch.stack([v.outer(v) for v in x]).mean(0), atol=1e-6)

    weight.requires_grad_()
    loss = load("input_moments")._drawn_loss
    generator = torch.Generator().manual_seed(0)
    logits = model(inputs_embeds=x[None]).logits[0]
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    total = loss(model, window, torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert float(total.detach()) == pytest.approx(float(each.detach().sum()))
    gradients = [torch.autograd.grad(one, weight, retain_graph=True)[0] for one in each]
    expected = torch.stack(gradients).square().mean(0)
    assert torch.allclose(found.fisher, expected, rtol=1e-4)


@pytest.mark.parametrize("columns", [256, 160])
def test_the_recipes_own_rule_is_the_encoders(load: Load, columns: int) -> None:
    rules, recipe = load("salience_rules"), list_recipes()["balanced-3"]
    weight = normal(24, columns)
    values, stored = rules.quantize_by_score(weight, recipe, rules.magnitude)
    packed = quantize_weight(weight, recipe)
    assert torch.allclose(values, dequantize_weight(packed.tensors, packed.layout), atol=1e-6)
    assert stored == 8 * sum(tensor.nbytes for tensor in packed.tensors.values())


def test_what_scores_most_is_salient(load: Load) -> None:
    """The weights of the columns that cost most get the wide codes, however small they are."""
    rules, recipe = load("salience_rules"), list_recipes()["balanced-3"]
    weight, importance = normal(32, 256), torch.ones(256)
    importance[[7, 200]] = 1e9
    score = rules.weighted_magnitude(importance)
    for per_tensor in (False, True):
        values, _ = rules.quantize_by_score(weight, recipe, score, per_tensor)
        error = (values - weight).square().mean(0)
        others = error[torch.tensor([k not in (7, 200) for k in range(256)])]
        assert float(error[[7, 200]].max()) < 0.05 * float(others.mean())


def test_one_threshold_leaves_places_empty(load: Load) -> None:
    """Where a group of the tensor is a hundred times larger, only its weights are salient."""
    rules, recipe = load("salience_rules"), list_recipes()["balanced-3"]
    weight = normal(16, 256)
    weight[:, 128:] *= 100
    score = rules.original_magnitude
    errors = []
    for per_tensor in (False, True):
        error = (rules.quantize_by_score(weight, recipe, score, per_tensor)[0] - weight).square()
        errors.append((float(error[:, :128].mean()), float(error[:, 128:].mean())))
    (small, large), (small_of_tensor, large_of_tensor) = errors
    assert small < 0.8 * small_of_tensor
    assert large == pytest.approx(large_of_tensor, rel=0.1)


def test_the_search_minds_what_errors_cost(load: Load) -> None:
    rules, recipe = load("salience_rules"), list_recipes()["balanced-3"]
    weight, cost = normal(32, 256), torch.logspace(-2, 2, 256)
    cost = cost[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    plain = rules.quantize_by_score(weight, recipe, rules.magnitude)[0]
    minded = rules.quantize_by_score(weight, recipe, rules.magnitude, error_cost=cost)[0]
    lost = [float(((w - weight).square() * cost).sum()) for w in (plain, minded)]
    assert lost[1] < 0.9 * lost[0]


def test_heavy_tails_want_more_salient_weights(load: Load) -> None:
    shapes, light = load("weight_shapes"), normal(64, 512)
    heavy = light.sign() * light.abs() ** 1.5
    found = [
        shapes.facts("model.layers.0.mlp.up_proj.weight", w, torch.ones(512))
        for w in (light, heavy)
    ]
    assert found[0]["kurtosis"] == pytest.approx(0, abs=0.15)
    assert found[1]["kurtosis"] > 2
    assert found[0]["best"] < found[1]["best"]
    for facts in found:
        assert facts["kind"] == "up_proj"
        assert facts["errors"] == sorted(facts["errors"], reverse=True)
        assert facts["errors"] == pytest.approx(facts["weighted_errors"])
        assert facts["gain"] >= 0


def test_a_base_bit_is_worth_a_bit(load: Load) -> None:
    shapes, recipe = load("weight_shapes"), list_recipes()["balanced-3"]
    one, other = (shapes.total_bits(recipe, error, 4.0) for error in (0.04, 0.01))
    assert one - other == pytest.approx(1)


def test_rows_are_measured_once(
    load: Load, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "prose.txt"
    text.write_text("Some questions stay open. " * 20)

    def run(*words: str) -> list[dict[str, Any]]:
        command = ["x", source, "--text", text, "--tokens", 200, "--self-tokens", 128]
        monkeypatch.setattr(sys, "argv", [str(w) for w in (*command, "--out", tmp_path, *words)])
        load("open_questions").main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "open-questions.json").read_text())[
            "rows"
        ]
        return rows

    first = run("--only", "paper-4", "shape")
    assert [row["variant"] for row in first if row["question"] == "alpha"] == [
        "3 %", "5 %", "8 %", "15 %",
    ]  # fmt: skip
    assert {row["kind"] for row in first if row["question"] == "shape"} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    both = run("--only", "paper-4", "shape", "rules", "inputs")
    assert both[: len(first)] == first
    assert [row["question"] for row in both].count("rules") == 8
    by_variant = {row["variant"]: row for row in both if row["question"] == "inputs"}
    assert len(by_variant) == 6
    own = next(row for row in both if row.get("variant") == "|w| / column scale")
    assert own["kl"] == pytest.approx(by_variant["column scale"]["kl"], rel=1e-3)
    assert own["bits"] == by_variant["in both"]["bits"]
    for name in ("alpha", "shape", "rules"):
        assert (tmp_path / f"open-questions-{name}.png").stat().st_size > 10_000
    page = (tmp_path / "open-questions.md").read_text()
    assert page.count("| source | rules |") == 8
    assert page.count("| source | alpha | paper-4 |") == 4
    assert "| source | down_proj | 128 × 160 |" in page
    assert run("--plot-only") == both
