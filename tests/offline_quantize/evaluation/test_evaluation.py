"""`precalib eval`: what is measured, how far off it can be, what is kept, and what is refused."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.cli.console import NullProgress
from offline_quantize.commands.quantize import quantize as run_quantize
from offline_quantize.evaluation import command as evaluate
from offline_quantize.evaluation import multiple_choice
from offline_quantize.evaluation.bootstrap import mean_interval
from offline_quantize.evaluation.kl import (
    compare,
    log_probabilities,
    refer,
    text_windows,
    write_text,
)
from offline_quantize.evaluation.models import load_original, load_packed, load_tokenizer
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan

BEGIN = 256
TEXT = "The original is compared with the quantized model, token by token. " * 12


class Bigram:
    """A stand-in for a model: the next token's logits depend on the last token alone."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.table = logits
        text_config = SimpleNamespace(bos_token_id=0, eos_token_id=1)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids], past_key_values=None)


@pytest.fixture(scope="module")
def source(byte_llama: Callable[..., Path]) -> Path:
    return byte_llama(hidden_size=64, intermediate_size=96, max_position_embeddings=128)


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    target = source.with_name("packed")
    plan = make_plan(open_checkpoint(source), Options("rtn-3", {"group_size": 64}))
    run_quantize(plan, target, NullProgress(), 1, "cpu", resume=False)
    return target


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tables(seed: int = 0, size: int = 200, off: float = 0.4) -> tuple[Bigram, Bigram, Tensor]:
    """An original, a disturbed copy of it, and a text of both."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, size, generator=generator)
    other = logits + off * torch.randn(size, size, generator=generator)
    return Bigram(logits), Bigram(other), torch.randint(size, (400,), generator=generator)


def exact(original: Bigram, other: Bigram, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p/q [T, vocabulary] and KL [T], in float64."""
    p, q = (model.table[window[:-1]].double().log_softmax(1) for model in (original, other))
    return p.exp(), p - q, (p.exp() * (p - q)).sum(1)


# what is measured


def test_a_model_against_itself(source: Path, text: Path) -> None:
    model = load_original(source, torch.bfloat16, "cpu")
    windows = text_windows(load_tokenizer(source), [text], 500, 128)
    found = compare(refer(model, windows, top=16), model, windows)
    assert found.kl.abs().max() == 0
    assert bool(found.agreement.all())
    assert found.loss.equal(found.original_loss)


def test_all_tokens_kept_is_the_direct_computation() -> None:
    original, other, window = tables()
    found = compare(
        refer(original, [window[:150], window[149:]], top=500), other, [window[:150], window[149:]]
    )
    _, _, kl = exact(original, other, window)
    # float32: 200 terms of p·log p/q, each off by a few eps of its logarithms
    torch.testing.assert_close(found.kl.double(), kl, rtol=0, atol=200**0.5 * 16 * 2**-23)
    summary = found.summary()
    loss = torch.nn.functional.cross_entropy(other.table[window[:-1]].double(), window[1:])
    assert summary["tokens"] == 399
    assert summary["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert summary["kl_99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)
    assert summary["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    same = original.table.argmax(1) == other.table.argmax(1)
    assert summary["agreement"] == pytest.approx(float(same[window[:-1]].float().mean()))
    assert summary["others_mass"] == 0


def test_kept_tokens_and_draws_have_no_bias() -> None:
    original, other, window = tables(size=1000)
    draws, top = 2000, 20
    reference = refer(original, [window], top, draws)
    p, ratio, kl = exact(original, other, window)
    found = compare(reference, other, [window]).kl.double()

    tail = p.scatter(1, reference.tokens.long(), 0)
    mass = tail.sum(1)
    torch.testing.assert_close(reference.others.exp().double(), mass, rtol=1e-5, atol=1e-7)
    assert mass.mean() > 0.2  # the draws matter here
    centre = (tail * ratio).sum(1) / mass
    spread = ((tail * (ratio - centre[:, None]).square()).sum(1) / mass).sqrt()
    noise = mass * spread / draws**0.5
    assert bool(((found - kl).abs() < 5 * noise + 1e-5).all())
    assert abs(float((found - kl).mean())) < 4 * float(noise.square().sum().sqrt()) / len(kl)
    without = (p * ratio - tail * ratio).sum(1)  # what dropping the others would give
    assert abs(float((without - kl).mean())) > 0.01


def test_few_draws_are_right_on_average() -> None:
    original, other, window = tables(size=1000)
    window = window.repeat(4)
    _, _, kl = exact(original, other, window)
    found = compare(refer(original, [window], 20), other, [window]).kl
    assert float(found.mean()) == pytest.approx(float(kl.mean()), rel=0.05)


def test_tokens_without_any_mass() -> None:
    """Padded vocabularies have logits of -inf; nothing becomes NaN."""
    original, other, window = tables()
    for model in (original, other):
        model.table[:, 30:] = -torch.inf
    window = window % 30
    found = compare(refer(original, [window], top=50), other, [window])
    _, _, kl = exact(Bigram(original.table[:, :30]), Bigram(other.table[:, :30]), window)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-5)


def test_ties_agree() -> None:
    tied = torch.zeros(4, 4)
    window = torch.tensor([0, 1, 2, 3])
    assert bool(compare(refer(Bigram(tied), [window]), Bigram(tied), [window]).agreement.all())
    other = torch.zeros(4, 4)
    reference = refer(Bigram(tied), [window])
    other[:, int(reference.tokens[0, 0])] = -1
    assert not bool(compare(reference, Bigram(other), [window]).agreement.any())


def test_the_packed_model_has_the_packed_weights(source: Path, packed: Path) -> None:
    model = load_packed(packed, torch.float32, "cpu")
    original = load_original(source, torch.float32, "cpu")
    checkpoint = open_packed(packed)
    assert len(checkpoint.config.modules) == 14
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        expected = original.get_submodule(name).weight
        if name in checkpoint.config.modules:
            assert not module.weight.equal(expected)
            expected = checkpoint.weight(name)
        assert module.weight.equal(expected), name


def test_command(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    ran = precalib(
        "eval", packed, "--against", source, "--text", text, "--json", tmp_path / "result.json"
    )
    assert ran.code == 0, ran.err
    written = json.loads((tmp_path / "result.json").read_text())
    manifest = json.loads((packed / "precalib.json").read_text())
    assert written["bits_per_weight"] == manifest["totals"]["bits_per_weight"]
    assert written["recipe"] == manifest["job"]["recipe"]
    result = written["text"]
    windows = text_windows(load_tokenizer(source), [text], 8192, 128)
    assert result["tokens"] == sum(len(window) - 1 for window in windows) == len(TEXT)
    original = load_original(source, torch.bfloat16, "cpu")
    quantized = load_packed(packed, torch.bfloat16, "cpu")
    p, q = (
        torch.cat([log_probabilities(model, window) for window in windows]).double()
        for model in (original, quantized)
    )
    kl = float((p.exp() * (p - q)).sum(1).mean())
    assert kl > 0.01
    assert result["kl"] == pytest.approx(kl, rel=1e-4)  # 260 tokens are all kept
    assert result["kl_interval"][0] < kl < result["kl_interval"][1]
    assert f"{result['kl']:.4f}" in ran.out
    assert f"{result['tokens']} tokens, text.txt" in ran.out


# text


def test_windows_begin_like_a_text_and_hold_all_of_it(source: Path, text: Path) -> None:
    windows = text_windows(load_tokenizer(source), [text, text], len(TEXT) + 30, 100)
    assert {len(window) for window in windows[:-1]} == {100}
    assert all(int(window[0]) == BEGIN for window in windows)
    tokens = torch.cat([window[1:] for window in windows]).tolist()
    spelled = load_tokenizer(source).decode(tokens)
    assert spelled == TEXT + TEXT[:30]


def test_the_original_writes_from_its_own_distribution() -> None:
    share = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
    model = Bigram(share.log())
    windows = write_text(model, 20_000, window=500)
    assert (len(windows), {len(window) for window in windows}) == (40, {500})
    assert {int(window[0]) for window in windows} == {0}
    counts = torch.zeros(3, 3)
    for window in windows:
        counts.index_put_((window[:-1], window[1:]), torch.ones(499), accumulate=True)
    found = counts / counts.sum(1, keepdim=True)
    noise = (share * (1 - share) / counts.sum(1, keepdim=True)).sqrt()
    assert bool(((found - share).abs() < 4.5 * noise).all())
    again = torch.stack(write_text(model, 20_000, window=500))
    assert torch.stack(windows).equal(again)
    assert not torch.stack(write_text(model, 20_000, window=500, seed=1)).equal(again)


def test_self_generated_needs_no_data(
    precalib: Callable[..., Any], source: Path, packed: Path, tmp_path: Path
) -> None:
    results = []
    for name in ("one", "two"):
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / name)  # own_cache restores it
        options = ("--against", source, "--self-generated", "--tokens", 256)
        ran = precalib("eval", packed, *options, "--json", tmp_path / "result.json")
        assert ran.code == 0, ran.err
        results.append(json.loads((tmp_path / "result.json").read_text()))
    assert results[0] == results[1]
    assert results[0]["text"]["tokens"] == 2 * 127
    assert results[0]["text"]["of"] == "written by the original"


# the cache


def test_the_original_is_not_loaded_twice(
    monkeypatch: pytest.MonkeyPatch, source: Path, packed: Path, text: Path, own_cache: Path
) -> None:
    loads = []

    def load(*arguments: Any) -> Any:
        loads.append(arguments)
        return load_original(*arguments)

    monkeypatch.setattr(evaluate, "load_original", load)

    def run(**options: Any) -> dict[str, Any]:
        request = evaluate.Request(**({"text": [text], "tokens": 300} | options))
        return evaluate.evaluate(packed, source, request)

    first = run()
    assert run() == first
    assert len(loads) == 1
    run(tokens=200)
    run(dtype=torch.float32)
    assert len(loads) == 3
    os.utime(source / "model.safetensors")
    assert run() == first
    assert len(loads) == 4
    for file in (own_cache / "precalib" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert run() == first
    assert len(loads) == 5
    assert run() == first
    assert len(loads) == 5
    names = {file.suffix for file in (own_cache / "precalib" / "references").iterdir()}
    assert names == {".safetensors"}


# intervals


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


# tasks


def test_score_by_hand() -> None:
    """Two choices under a bigram model: ln p of each token of the choice, over its characters."""
    share = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    choices = [
        multiple_choice.Answer(torch.tensor([0, 1, 1, 2]), start=2, length=5),
        multiple_choice.Answer(torch.tensor([0, 1, 0]), start=2, length=2),
    ]
    found = multiple_choice.score(Bigram(share.log()), choices)
    expected = [(math.log(0.6) + math.log(0.3)) / 5, math.log(0.1) / 2]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert multiple_choice.picks(Bigram(share.log()), [choices, choices[::-1]]).tolist() == [0, 1]


def test_answers_split_where_the_choice_begins(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    question = multiple_choice.Question("Question: is it?\n", ("yes", "not now"), 0)
    for choice, answer in zip(
        question.choices, multiple_choice.answers(question, tokenizer, 100), strict=True
    ):
        assert tokenizer.decode(answer.tokens[1 : answer.start]) == "Question: is it?\n Answer:"
        assert tokenizer.decode(answer.tokens[answer.start :]) == f" {choice}"
        assert (int(answer.tokens[0]), answer.length) == (BEGIN, len(choice))
    short = multiple_choice.answers(question, tokenizer, 12)[1]
    assert tokenizer.decode(short.tokens) == "wer: not now"[-12:]
    assert tokenizer.decode(short.tokens[short.start :]) == " not now"
    shorter = multiple_choice.answers(question, tokenizer, 3)[
        1
    ]  # the choice alone is longer: all of it
    assert tokenizer.decode(shorter.tokens) == ": not now"


def test_padding_changes_nothing(source: Path) -> None:
    model = load_original(source, torch.float32, "cpu")
    question = multiple_choice.Question("Which?", ("a", "a much longer one", "bc"), 0)
    prepared = multiple_choice.answers(question, load_tokenizer(source), 128)
    alone = torch.cat([multiple_choice.score(model, [answer]) for answer in prepared])
    torch.testing.assert_close(multiple_choice.score(model, prepared), alone, rtol=1e-4, atol=1e-5)


def test_summary_of_tasks() -> None:
    questions = [multiple_choice.Question("?", ("a", "b"), gold) for gold in (0, 1, 1, 0)]
    found = multiple_choice.summary(
        questions, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1])
    )
    assert found["original_accuracy"] == 0.75
    assert found["accuracy"] == 0.5
    assert found["same_choice"] == 0.75
    assert found["accuracy_interval"][0] <= 0.5 <= found["accuracy_interval"][1]


def test_tasks_by_command(
    precalib: Callable[..., Any], source: Path, packed: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tasks.jsonl"
    lines = [
        {"query": f"Q{i}", "choices": ["one", "two", "three"], "gold": i % 3} for i in range(9)
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    options = ("--against", source, "--tasks", file, "--limit", 7)
    ran = precalib("eval", packed, *options, "--json", tmp_path / "result.json")
    assert ran.code == 0, ran.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert "text" not in result
    assert result["tasks"][str(file)]["questions"] == 7
    assert "tasks.jsonl, 7 questions" in ran.out
    assert "log-likelihood of the choice per character" in ran.out
    assert precalib("eval", packed, *options).out == ran.out  # the original's choices from disk


# what is refused


def test_nothing_to_measure_with(precalib: Callable[..., Any], source: Path, packed: Path) -> None:
    assert "--self-generated" in precalib("eval", packed, "--against", source).sentence


def test_two_kinds_of_text(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path
) -> None:
    ran = precalib("eval", packed, "--against", source, "--text", text, "--self-generated")
    assert "exclude each other" in ran.sentence


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(None, "No such file"), (b"\xff\xfe\x00", "not UTF-8 text"), (b"", "too little text")],
)
def test_bad_text(
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    tmp_path: Path,
    data: bytes | None,
    complaint: str,
) -> None:
    file = tmp_path / "bad.txt"
    if data is not None:
        file.write_bytes(data)
    sentence = precalib("eval", packed, "--against", source, "--text", file).sentence
    assert complaint in sentence
    assert str(file) in sentence


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"query": "q", "choices": ["a"]}',
        '{"query": "q", "choices": ["a"], "gold": 1}',
        '{"query": "q", "choices": ["a"], "gold": true}',
        '{"query": "q", "choices": [], "gold": 0}',
        '{"query": "q", "choices": [""], "gold": 0}',
        '{"query": 1, "choices": ["a"], "gold": 0}',
    ],
)
def test_bad_tasks(
    precalib: Callable[..., Any], source: Path, packed: Path, tmp_path: Path, line: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n")
    sentence = precalib("eval", packed, "--against", source, "--tasks", file).sentence
    assert f"{file}, line 2: each line must be like" in sentence


def test_no_questions(
    precalib: Callable[..., Any], source: Path, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    ran = precalib("eval", packed, "--against", source, "--tasks", tmp_path / "empty.jsonl")
    assert "holds no question" in ran.sentence


def test_transformers_missing(
    monkeypatch: pytest.MonkeyPatch,
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    text: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    sentence = precalib("eval", packed, "--against", source, "--text", text).sentence
    assert "pip install 'vllm-precalib[eval]'" in sentence


def test_checkpoints_given_the_wrong_way_round(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path
) -> None:
    ran = precalib("eval", source, "--against", packed, "--text", text)
    assert "not a packed checkpoint" in ran.sentence
    ran = precalib("eval", packed, "--against", packed, "--text", text)
    assert "already quantized (precalib)" in ran.sentence


def test_incomplete_source(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    """transformers would fill the gap with random values."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    sentence = precalib("eval", packed, "--against", broken, "--text", text).sentence
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in sentence


def test_no_tokenizer(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    sentence = precalib("eval", packed, "--against", bare, "--text", text).sentence
    assert f"{bare}: no tokenizer can be loaded" in sentence


def test_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    text: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(text))
    sentence = precalib("eval", packed, "--against", source, "--text", text).sentence
    assert "set XDG_CACHE_HOME to a folder that can" in sentence
