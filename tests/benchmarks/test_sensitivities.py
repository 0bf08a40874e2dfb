"""Mixes by other factors: what is measured, and the table."""

import json
import sys

import pytest

pytestmark = pytest.mark.slow


def test_mixes_are_measured_once(load, source, tmp_path, monkeypatch, capsys):
    sensitivities = load("sensitivities")
    text, work = tmp_path / "prose.txt", tmp_path / "work"
    text.write_text("One text decides. " * 20)

    def run(*words):
        command = [source, "--text", text, "--work", work, "--mode", "none", *words]
        monkeypatch.setattr(sys, "argv", ["sensitivities.py", *map(str, command)])
        sensitivities.main()
        return capsys.readouterr().out

    run("--parts", "q", "down", "--sizes", "3.85", "--cases", "today", "no factors")
    (path,) = work.glob("*/none/parts.json")
    parts = json.loads(path.read_text())
    assert parts.keys() == {"q", "down"}
    (path,) = work.glob("*/none/results.json")
    today, plain = json.loads(path.read_text())["rows"]
    assert (today["case"], plain["case"]) == ("today", "no factors")
    assert today["mix"] != plain["mix"]
    assert today["mix"].keys() == plain["mix"].keys()
    assert 0 < today["kl"] != plain["kl"] > 0
    again = run("--parts", "q", "--sizes", "3.85", "--cases", "today", "no factors")
    assert "KL" not in again
    each = {name: facts["kl"] / facts["weights"] for name, facts in parts.items()}
    relative = each["down"] / each["q"]
    assert f"| down | {parts['down']['kl']:.4f}; {relative:.2f} |" in again
    lines = again[again.index("| factors") :].splitlines()
    assert lines[2] == f"| today | {today['kl']:.4f} |"
    assert lines[3] == f"| no factors | {plain['kl'] / today['kl']:.3f} |"


def test_factors_change_what_they_name(load, source):
    sensitivities = load("sensitivities")
    bench = sensitivities.Bench.__new__(sensitivities.Bench)
    bench.checkpoint, bench.known = sensitivities.open_checkpoint(source), None
    mixes = {case: bench.mix(3.85, changes) for case, changes in sensitivities.CASES.items()}
    assert mixes["today"] == bench.mix(3.85, {})
    assert mixes["today"] != mixes["no factors"]


def test_parts(load, source):
    belongs = load("sensitivities").belongs
    name = "model.layers.{}.mlp.down_proj.weight"
    assert belongs(name.format(3), "down", 4)
    assert not belongs(name.format(3), "up", 4)
    places = [
        p
        for i in range(4)
        for p in ("first two layers", "last layer", "other layers")
        if belongs(name.format(i), p, 4)
    ]
    assert places == ["first two layers"] * 2 + ["other layers", "last layer"]
