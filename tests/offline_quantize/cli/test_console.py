"""What is shown at which width, on a terminal and off it."""

import io

import pytest
from rich.console import Console

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.cli import console
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan


@pytest.fixture
def terminal(monkeypatch):
    """Replaces both consoles by a terminal of the given width; returns what is written to it."""

    def open_terminal(width):
        shown = io.StringIO()
        options = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
        screen = Console(file=shown, force_terminal=True, width=width, color_system=None, **options)
        monkeypatch.setattr(console, "out", screen)
        monkeypatch.setattr(console, "err", screen)
        return shown

    return open_terminal


@pytest.fixture
def manifest(checkpoint, weights, quantize):
    tensors = {
        "model.layers.31.self_attn.q_proj.weight": weights()(64, 128),
        "model.layers.31.mlp.experts.127.down_proj.weight": weights()(64, 1024),
    }
    return read_manifest(quantize(checkpoint(tensors=tensors, config={})))


def table_of(text):
    lines = text.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("bits: "))]


def test_the_table_off_a_terminal_is_as_wide_as_it_needs(manifest, capsys):
    console.show_tensors(manifest)
    header, rule, *rows = table_of(capsys.readouterr().out)
    assert header.split() == ["module", "shape", "bits", "error", "KL", "entropy", "salient"]
    assert set(rule) == {"─"}
    assert [row.split()[0] for row in rows] == list(manifest.tensors)
    assert rows[0].split()[1:3] == ["64×1024", rows[0].split()[2]]
    assert len({len(row.rstrip()) for row in rows}) == 1


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_on_a_terminal_stays_within_it(manifest, terminal, width):
    shown = terminal(width)
    console.show_tensors(manifest)
    lines = table_of(shown.getvalue())
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    if width == 200:
        assert len(lines) == 4


def test_overflow_has_a_column_where_there_is_any(manifest, capsys):
    console.show_totals(manifest)
    assert "found no place" not in capsys.readouterr().out
    totals = manifest.totals.model_copy(update={"salient_overflow": 12345})
    crowded = manifest.model_copy(update={"totals": totals})
    console.show_tensors(crowded)
    console.show_totals(crowded)
    shown = capsys.readouterr().out
    assert "overflow" in shown.splitlines()[0]
    assert "12,345 weights above λ' found no place in their group" in shown


def test_a_plan(checkpoint, capsys):
    options = Options("rtn-4", {"alpha": None}, [("mlp", "balanced-4")], ["layers.1.self_attn"])
    console.show_plan(make_plan(open_checkpoint(checkpoint()), options))
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == [
        "recipe",
        "weights",
        "tensors",
        "effective",
        "bits",
        "about",
    ]
    assert "\nrtn-4 " in shown
    assert "\nbalanced-4 " in shown
    assert "Kept (--keep): model.layers.1.self_attn.k_proj.weight, " in shown
    assert " and 1 more\n" in shown


def test_the_bar_is_shown_on_a_terminal_only(terminal, capsys):
    with console.progress_bar(100) as progress:
        progress.begin("tensor")
        progress.advance(50)
    assert type(progress) is NullProgress
    assert capsys.readouterr() == ("", "")
    shown = terminal(80)
    with console.progress_bar(10**9) as progress:
        progress.begin("model.layers.0.[mlp].up_proj.weight")
        progress.advance(5 * 10**8)
    text = shown.getvalue()
    assert "model.layers.0.[mlp]" in text
    assert "500.0/1000.0 MB" in text or "0.5/1.0 GB" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.235 MB"), (8.1e9, "8.10 GB")],
)
def test_sizes(nbytes, text):
    assert console.size(nbytes) == text


def test_names_send_nothing_to_the_terminal(capsys):
    table = console.new_table("a\x1b[2Jb")
    table.add_row("c\x9b31m\u202ed")
    console.show_table(table)
    console.out.print("e\x1b]0;title\x07\tf\ng\udcff", style="bold")
    console.err.print("h\x1b[31m", style="red")
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert not set(text) & set("\x1b\x9b\x07\u202e\udcff")
    for part in ("a�[2Jb", "c�31m�d", "e�]0;title�", "f\ng�", "h�[31m"):
        assert part in text
