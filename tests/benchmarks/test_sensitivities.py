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
        command = [source, "--text", text, "--work", work, "--activations", "none", *words]
        monkeypatch.setattr(sys, "argv", ["sensitivities.py", *map(str, command)])
        sensitivities.main()
        return capsys.readouterr().out

    run("--sizes", "3.85", "--cases", "today", "no factors")
    (path,) = work.glob("*/none/results.json")
    today, plain = json.loads(path.read_text())["rows"]
    assert (today["case"], plain["case"]) == ("today", "no factors")
    assert today["mix"] != plain["mix"]
    assert today["mix"].keys() == plain["mix"].keys()
    assert 0 < today["kl"] != plain["kl"] > 0
    again = run("--sizes", "3.85", "--cases", "today", "no factors")
    assert "KL" not in again
    lines = again.splitlines()
    assert lines[2] == f"| today | {today['kl']:.4f} |"
    assert lines[3] == f"| no factors | {plain['kl'] / today['kl']:.3f} |"


def test_factors_change_what_they_name(load, source):
    sensitivities = load("sensitivities")
    bench = sensitivities.Bench.__new__(sensitivities.Bench)
    bench.checkpoint = sensitivities.open_checkpoint(source)
    mixes = {case: bench.mix(3.85, changes) for case, changes in sensitivities.CASES.items()}
    assert mixes["today"] == bench.mix(3.85, {})
    assert mixes["today"] != mixes["no factors"]
