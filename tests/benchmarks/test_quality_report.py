"""The quality benchmark's table: ratios along the curve, columns, order and markers."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


def row(method: str, bits: float, kl: float, **facts: str) -> dict[str, Any]:
    text = {"kl": kl, "kl_interval": [kl / 2, 2 * kl], "agreement": 0.5}
    texts = {"a": text, "b": text | {"kl": 2 * kl}}
    where = {"method": method, "variant": "v", "bits": bits, "texts": texts}
    return where | {"calibration": "", "note": ""} | facts


def test_best_is_log_linear(load: Load) -> None:
    best = load("quality_report").best
    rows = [row("A", 3, 1.0), row("A", 5, 0.01), row("B", 3, 0.9), row("B", 4, 0.2)]
    assert best(4, rows, "a") == pytest.approx(0.1)  # A: the geometric mean
    assert best(4, rows, "b") == pytest.approx(0.2)
    assert best(3, rows, "a") == pytest.approx(0.9)
    assert best(5.1, rows, "a") is None
    assert best(2.9, rows, "a") is None
    assert best(5.04, rows, "a") == pytest.approx(0.01 * 10**-0.04)  # on along A's line
    assert best(2.96, [*rows[2:], row("B", 3, 0.9)], "a") == pytest.approx(0.9 * 4.5**0.04)
    assert best(3, rows[:1], "a") is None  # one point is no line


def test_best_of_the_same_bits_counts(load: Load) -> None:
    """8 and 32 windows at the same size: the line goes through the better one."""
    rows = [row("A", 3, 1.0), row("A", 3, 0.8), row("A", 5, 0.2), row("A", 5, 0.3)]
    assert load("quality_report").best(4, rows, "a") == pytest.approx(0.4)


def test_shift_table(load: Load) -> None:
    report = load("quality_report")
    prose = row("GPTQ, prose", 3, 0.4, calibration="prose")
    code = row("GPTQ, code", 3, 0.5, calibration="code")
    code["texts"]["b"]["kl"] = 0.2
    rows = [row("precalib x", 3, 0.3), prose, code, row("AWQ, prose", 3, 9, calibration="prose")]
    lines = report.shift_table(rows, ["a", "b"]).splitlines()
    head = "| method | variant | calibrated on | effective bits | a: KL | × best | b: KL | × best |"
    assert lines[0] == head
    assert lines[2:] == [
        "| precalib x | v | nothing | 3.000 | 0.3000 |  | 0.6000 |  |",
        "| GPTQ | v | prose | 3.000 | 0.4000 | 1.00 | 0.8000 | 4.00 |",
        "| GPTQ | v | code | 3.000 | 0.5000 | 1.25 | 0.2000 | 1.00 |",
    ]
    assert report.shift_table(rows[:2], ["a"]) == ""
    rows.append(row("GPTQ, verse", 3, 0.4, calibration="verse"))
    del code["texts"]["a"]
    assert "| code | 3.000 |  |  | 0.2000 | 1.00 |" in report.shift_table(rows, ["a", "b"])
    del prose["texts"]["a"]  # verse alone: nothing to compare with
    assert "a: KL" not in report.shift_table(rows, ["a", "b"])


def test_task_table(load: Load) -> None:
    report = load("quality_report")
    task = {"questions": 50, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}
    task |= {"original_accuracy": 0.7, "original_accuracy_interval": [0.6, 0.8]}
    rows = [row("A", 3, 1.0) | {"tasks": {"quiz": task}}, row("B", 3, 1.0)]
    lines = report.task_table(rows).splitlines()
    assert lines[0] == "| method | variant | effective bits | quiz (50 questions) | 95 % |"
    assert lines[2] == "| original | bfloat16 | 16 | 70.0 % | 60.0–80.0 % |"
    assert lines[3:] == ["| A | v | 3.000 | 50.0 % | 40.0–60.0 % |"]
    assert report.task_table(rows[1:]) == ""
    whole = report.tables(rows, ["a"])
    assert whole.index("| B | v |") < whole.index("## Multiple choice")


def test_table(load: Load) -> None:
    report = load("quality_report")
    rows = [
        row("GPTQ", 3, 0.4, calibration="c"),
        row("GPTQ", 5, 0.1, calibration="c"),
        row("Found", 4, 0.001, note="knows the grid"),
        row("Found", 3, 0.002, note="knows the grid"),
        row("A", 3, 1.0),
        row("A", 5, 0.01),
        row("precalib x", 4, 0.05),
        row("precalib balanced", 6, 0.01),
    ]
    written = report.table(report.ranked(rows), ["b", "a"])
    lines = written.splitlines()
    assert lines[0].startswith("| method | variant | effective bits | b: KL | 95 % |")
    assert len({line.count("|") for line in lines[:11]}) == 1
    assert lines[3] == (
        "| precalib balanced | v | 6.000 | 0.0200 | 0.0050–0.0200 | 50.0 % |  |  "
        "| 0.0100 | 0.0050–0.0200 | 50.0 % |  |  |"
    )
    assert lines[4] == (  # A alone is data-free here; 0.2 is GPTQ's geometric mean
        "| precalib x | v | 4.000 | 0.1000 | 0.0250–0.1000 | 50.0 % | 0.50 | 0.25 "
        "| 0.0500 | 0.0250–0.1000 | 50.0 % | 0.50 | 0.25 |"
    )
    names = [line.split(" | ")[0].strip("| ") for line in lines[5:11]]
    assert names == ["A", "A", "Found", "Found", "GPTQ", "GPTQ"]
    assert "| Found | v \\* | 3.000 |" in written
    assert written.endswith("\n\\* knows the grid\n")


def test_plot_has_one_text_of_each_method(load: Load) -> None:
    rows = [
        row("precalib x", 3, 0.3),
        row("precalib x, prose", 3, 0.3, calibration="prose"),
        row("GPTQ, code", 3, 0.4, calibration="code"),
        row("GPTQ, prose", 3, 0.4, calibration="prose"),
        row("GPTQ, prose", 4, 0.2, calibration="prose"),
        row("AWQ, code", 3, 0.4, calibration="code"),
        row("RTN", 3, 1.0),
    ]
    found = load("quality_report").plotted(rows)
    assert found == {"precalib x", "GPTQ, prose", "AWQ, code", "RTN"}


def test_table_goes_between_its_markers(load: Load, tmp_path: Path) -> None:
    report = load("quality_report")
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.insert_table("new\n", page)
        assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(report.SourceError, match="around its table"):
        report.insert_table("new\n", page)
    assert page.read_text() == "no markers"
