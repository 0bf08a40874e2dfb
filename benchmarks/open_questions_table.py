"""Tables of the rows of open_questions.py."""

import itertools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: what was measured on models, then what was found about single weights."""
    shapes = [row for row in rows if row["question"] == "shape"]
    measured = [row for row in rows if row["question"] != "shape"]
    return "\n".join((*_measured(measured), "", *_shapes(shapes))) + "\n"


def _measured(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | question | method | variant | text | effective bits | KL | 95 % | perplexity |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["question"], row["method"])):
        low, high = row["kl_interval"]
        cells = [row["model"], row["question"], row["method"], row["variant"].replace("|", "\\|")]
        cells += [row["text"], f"{row['bits']:.3f}", f"{row['kl']:.4f}", f"{low:.4f}–{high:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{row['perplexity']:.2f}"]) + " |")
    return lines


def _shapes(rows: Sequence[Row]) -> list[str]:
    """Medians over the weights of a kind; α and bits saved by the error of weights, and of outputs.

    The kinds come in the order of their kurtosis.
    """
    lines = [
        "| model | kind | rows × columns | excess kurtosis | best α | bits saved | "
        "best α, outputs | bits saved, outputs |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    found = []
    by_kind = sorted(rows, key=_kind)
    for (model, kind), group in itertools.groupby(by_kind, key=_kind):
        own = list(group)

        def middle(name: str, own: Sequence[Row] = own) -> float:
            return float(median(row[name] for row in own))

        cells = [f"{own[0]['rows']} × {own[0]['columns']}", f"{middle('kurtosis'):.2f}"]
        for prefix in ("", "weighted_"):
            cells += [f"{100 * middle(prefix + 'best') / 128:.1f} %"]
            cells += [f"{middle(prefix + 'gain'):.3f}"]
        found.append((model, middle("kurtosis"), " | ".join((model, kind, *cells))))
    return lines + [f"| {line} |" for _, _, line in sorted(found)]


def _kind(row: Row) -> tuple[str, str]:
    return row["model"], row["kind"]
