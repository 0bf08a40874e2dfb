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
from offline_quantize.evaluation.models import load_original

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


def test_moments_are_means_over_tokens(load: Load, source: Path) -> None:
    model = load_original(source, torch.float32, "cpu")
    name = "model.layers.0.mlp.down_proj"
    weights = {f"{name}.weight": model.get_submodule(name).weight}
    windows = [torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9, 2, 6])]
    (found,) = load("input_moments").input_moments(model, weights, windows).values()
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: seen.extend(given[0].detach().flatten(0, -2))
    )
    for window in windows:
        model(window[None])
    hook.remove()
    assert len(seen) == 8
    expected = torch.stack([x.outer(x) for x in seen]).mean(0)
    assert torch.allclose(found.hessian, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert torch.allclose(found.mean_square, expected.diagonal(), rtol=1e-3)


def test_fisher_is_the_mean_square_of_tokens_gradients(load: Load) -> None:
    model, window = Toy(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    weight = model.inner.weight
    moments = load("input_moments")
    (found,) = moments.fisher_diagonals(model, {"inner.weight": weight}, [window]).values()
    x = model.embedding(window)
    weight.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    logits = model(inputs_embeds=x[None]).logits[0]
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    total = moments._drawn_loss(model, window, torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert float(total.detach()) == pytest.approx(float(each.detach().sum()))
    gradients = [torch.autograd.grad(one, weight, retain_graph=True)[0] for one in each]
    expected = torch.stack(gradients).square().mean(0)
    assert torch.allclose(found, expected, rtol=1e-4)


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
    code = tmp_path / "code.txt"
    code.write_text("if question in answers:\n    return answers[question]\n" * 40)

    def run(*words: str) -> list[dict[str, Any]]:
        command = ["x", source, "--text", text, code, "--domains", code]
        command += ["--tokens", 200, "--input-tokens", 128]
        monkeypatch.setattr(sys, "argv", [str(w) for w in (*command, "--out", tmp_path, *words)])
        load("open_questions").main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "open-questions.json").read_text())[
            "rows"
        ]
        return rows

    first = run("--only", "alpha paper-4", "shape")
    assert [row["variant"] for row in first if row["question"] == "alpha"] == [
        "3 %", "5 %", "8 %", "12 %", "15 %",
    ]  # fmt: skip
    assert {row["kind"] for row in first if row["question"] == "shape"} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    both = run("--only", "paper-4", "shape", "rules", "inputs", "domain")
    assert both[: len(first)] == first
    assert [row["question"] for row in both].count("rules") == 10
    found = {(row["method"], row["variant"]): row for row in both if row["question"] == "inputs"}
    assert len(found) == 7
    own = [row for row in both if row.get("variant") == "|w| / column scale"]
    for row, method, variant in (
        (own[0], "X·Xᵀ = b·I", "column scale"),
        (own[2], "X·Xᵀ = diag(E[x²])", "in both"),  # the encoder's own way
    ):
        assert row["kl"] == pytest.approx(found[method, variant]["kl"], rel=1e-3)
        assert row["bits"] == found[method, variant]["bits"]
    domain = {(row["variant"], row["text"]): row for row in both if row["question"] == "domain"}
    assert set(domain) == {(a, b) for a in ("own text", "code") for b in ("prose", "code")}
    fed_back = found["X·Xᵀ whole", "column scale"]
    assert domain["own text", "prose"]["kl"] == fed_back["kl"]
    assert {row["text"] for row in both if row["question"] == "inputs"} == {"prose"}
    calibrated = next(row for row in both if row["question"] == "calibration")
    assert (calibrated["method"], calibrated["variant"]) == ("paper-4", "error feedback")
    assert calibrated["kl"] != first[2]["kl"]
    assert calibrated["bits"] == first[2]["bits"]
    for name in ("alpha", "shape", "rules", "inputs"):
        assert (tmp_path / f"open-questions-{name}.png").stat().st_size > 10_000
    page = (tmp_path / "open-questions.md").read_text()
    assert page.count("| source | rules |") == 10
    assert page.count("| source | alpha | paper-4 |") == 5
    assert "| source | down_proj | 128 × 160 |" in page
    assert run("--plot-only") == both
