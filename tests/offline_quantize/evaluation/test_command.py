"""`precalib eval`: what it writes and shows, what it keeps on disk, and what it refuses."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.evaluation import command
from offline_quantize.evaluation.kl import log_probabilities, text_windows
from offline_quantize.evaluation.models import load_original, load_packed, load_tokenizer
from offline_quantize.evaluation.result import EvaluationResult


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
    assert result["tokens"] == sum(len(window) - 1 for window in windows) == len(text.read_text())
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


def test_the_original_is_not_loaded_twice(
    monkeypatch: pytest.MonkeyPatch, source: Path, packed: Path, text: Path, own_cache: Path
) -> None:
    loads = []

    def load(*arguments: Any) -> Any:
        loads.append(arguments)
        return load_original(*arguments)

    monkeypatch.setattr(command, "load_original", load)

    def run(**options: Any) -> EvaluationResult:
        request = command.Request(**({"text": [text], "tokens": 300} | options))
        return command.evaluate(packed, source, request)

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
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr(command, "versions", lambda: pytest.fail("transformers is imported"))
    ask = ("eval", packed, "--against", bare, "--text", text)
    assert f"{bare}: holds no tokenizer (tokenizer.json or another file" in precalib(*ask).sentence
    monkeypatch.undo()
    (bare / "tokenizer_config.json").write_text("{}")
    sentence = precalib(*ask).sentence
    assert f"{bare}: no tokenizer can be loaded (" in sentence
    assert not sentence.endswith(": )")


def test_code_of_a_checkpoint_is_refused_without_a_question(
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    config = json.loads((mine / "config.json").read_text())
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (mine / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": classes})
    )
    (mine / "code.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    sentence = precalib("eval", packed, "--against", mine, "--text", text).sentence
    code = "the model needs code that comes with the checkpoint (code.C, code.M), which precalib"
    assert f"mine/config.json: {code}" in sentence
    assert "trust_remote_code" not in sentence


def test_a_result_needs_its_folder(
    precalib: Callable[..., Any], source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "none" / "result.json"
    ran = precalib("eval", packed, "--against", source, "--text", text, "--json", out)
    assert f"--json {out}: there is no folder {out.parent}; make it first" in ran.sentence
    assert not out.parent.exists()


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
