"""Tables and plot of measured rows."""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from precalib_kernels.errors import SourceError

Row = Mapping[str, Any]
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
OURS = "precalib"
KL_LABEL = "KL(original ‖ quantized), nats per token"
FIRST = "precalib balanced"
REACH = 0.05  # bits; a method of the same size may miss ours by a few hundredths


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Ours first, then data-free methods, then calibrated ones; each by its bits."""
    return sorted(rows, key=lambda row: (*_rank(row), row["bits"]))


def best(bits: float, rows: Sequence[Row], text: str) -> float | None:
    """KL of the best method at so many bits, log-linear between a method's own points.

    Of several points at the same bits the best counts. A method's first and its last line reach on
    by REACH bits. None where no method reaches.
    """
    found = []
    for method in {row["method"] for row in rows}:
        smallest = dict(reversed(curve(method, rows, text)))
        points = sorted(smallest.items())
        pairs = list(itertools.pairwise(points))
        for index, ((low, kl_low), (high, kl_high)) in enumerate(pairs):
            below = REACH if index == 0 else 0
            above = REACH if index == len(pairs) - 1 else 0
            if low - below <= bits <= high + above:
                share = (bits - low) / (high - low)
                found.append(kl_low ** (1 - share) * kl_high**share)
    return min(found, default=None)


def curve(method: str, rows: Sequence[Row], text: str) -> list[tuple[float, float]]:
    """A method's points on a text, by bits."""
    own = [row for row in rows if row["method"] == method and text in row["texts"]]
    return sorted(point(row, text) for row in own)


def point(row: Row, text: str) -> tuple[float, float]:
    """Bits and KL."""
    return row["bits"], row["texts"][text]["kl"]


def tables(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """All tables of the page: KL of every row, the domain shift, and tasks, as far as measured.

    texts: of the first table; the domain shift is shown on all that were measured.
    """
    found = [table(rows, texts)]
    others = sorted({text for row in rows for text in row["texts"]} - set(texts))
    if shift := shift_table(rows, [*texts, *others]):
        found.append(f"## Calibrated on one kind of text, measured on another\n\n{shift}")
    if tasks := task_table(rows):
        found.append(f"## Multiple choice\n\n{tasks}")
    return "\n".join(found)


def shift_table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Methods that were calibrated on several texts: KL, and KL relative to the best of the texts.

    A text is shown if two rows of a method can be compared on it. Our own rows that were measured
    on all of those stand beside them. Empty if there is no such text.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["calibration"] and not _ours(row):
            stem = row["method"].removesuffix(f", {row['calibration']}")
            groups.setdefault((stem, row["variant"]), []).append(row)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    texts = [
        text
        for text in texts
        if any(sum(text in row["texts"] for row in group) > 1 for group in groups.values())
    ]
    if not texts:
        return ""
    heads = " | ".join(f"{text}: KL | × best" for text in texts)
    lines = [
        f"| method | variant | calibrated on | effective bits | {heads} |",
        "|---|---|---|--:" + "|--:" * 2 * len(texts) + "|",
    ]
    ours = [row for row in rows if _ours(row) and set(texts) <= set(row["texts"])]
    for (method, variant), group in [(("", ""), ours), *groups.items()]:
        for row in group:
            where = row["calibration"] or "nothing"
            names = (method or row["method"], variant or row["variant"], where)
            cells = [*names, f"{row['bits']:.3f}"]
            for text in texts:
                all_kl = [point(other, text)[1] for other in group if text in other["texts"]]
                if text not in row["texts"]:
                    cells += ["", ""]
                    continue
                kl = point(row, text)[1]
                cells += [f"{kl:.4f}", f"{kl / min(all_kl):.2f}" if method else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def task_table(rows: Sequence[Row]) -> str:
    """Accuracy of the rows that were asked questions; empty if none was."""
    asked = [row for row in rows if row.get("tasks")]
    if not asked:
        return ""
    tasks = sorted({task for row in asked for task in row["tasks"]})
    first = {
        task: next(row for row in asked if task in row["tasks"])["tasks"][task] for task in tasks
    }
    heads = " | ".join(f"{task} ({first[task]['questions']:,} questions) | 95 %" for task in tasks)
    lines = [
        f"| method | variant | effective bits | {heads} |",
        "|---|---|--:" + "|--:" * 2 * len(tasks) + "|",
    ]
    original = ["original", "bfloat16", "16"]
    for task in tasks:
        original += _accuracy(first[task], "original_accuracy")
    lines.append("| " + " | ".join(original) + " |")
    for row in asked:
        cells = [row["method"], row["variant"], f"{row['bits']:.3f}"]
        for task in tasks:
            found = row["tasks"].get(task)
            cells += _accuracy(found, "accuracy") if found else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """The rows as a Markdown table, one group of columns for each text."""
    groups = " | ".join(f"{text}: KL | 95 % | top-1 | × data-free | × calibrated" for text in texts)
    originals = " | ".join("0 | | 100 % | |" for _ in texts)
    lines = [
        f"| method | variant | effective bits | {groups} |",
        "|---|---|--:" + "|--:" * 5 * len(texts) + "|",
        f"| original | bfloat16 | 16 | {originals} |",
    ]
    others = [row for row in rows if not _ours(row)]
    free = [row for row in others if not row["calibration"] and not row["note"]]
    calibrated = [row for row in others if row["calibration"]]
    for row in rows:
        cells = [row["method"], row["variant"] + _mark(row), f"{row['bits']:.3f}"]
        for text in texts:
            values = row["texts"].get(text)
            if values is None:
                cells += [""] * 5
                continue
            low, high = values["kl_interval"]
            cells += [f"{values['kl']:.4f}", f"{low:.4f}–{high:.4f}"]
            cells.append(f"{100 * values['agreement']:.1f} %")
            cells += [_ratio(row, peers, text) for peers in (free, calibrated)]
        lines.append("| " + " | ".join(cells) + " |")
    notes = sorted({row["note"] for row in rows if row["note"]})
    return "\n".join(lines) + "\n" + "".join(f"\n\\* {note}\n" for note in notes)


def insert_table(text: str, page: Path) -> None:
    """Put the table where the page has its markers; a page that does not exist is made."""
    written = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SourceError(f"{page}: has no lines '{BEGIN}' and '{END}' around its table")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def plot(rows: Sequence[Row], texts: Sequence[str], path: Path) -> None:
    """Bits against KL on a logarithmic axis, one panel per text and one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["method"] in plotted(rows)]
    size = (5 + 5.5 * len(texts), 6)
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=size, dpi=150, sharey=True, squeeze=False
    )
    methods = {row["method"]: row for row in rows}
    smallest = min(
        point(row, text)[1]
        for text in texts
        for row in rows
        if text in row["texts"] and not row["note"]
    )
    for text, axes in zip(texts, panels[0], strict=True):
        for index, (method, first) in enumerate(methods.items()):
            points = curve(method, rows, text)
            ours = _ours(first)
            axes.plot(
                [bits for bits, _ in points],
                [kl for _, kl in points],
                label=method + (" (found grid)" if first["note"] else ""),
                marker="o" if ours else "osD^v<>"[index % 7],
                linestyle=_line(first),
                linewidth=2.4 if method == FIRST else 1.3,
                markersize=7 if ours else 5,
                color=pyplot.get_cmap("tab20")(index % 20),
            )
        kl_axes(axes, text, "effective bits per weight")
        axes.set_ylim(bottom=smallest / 1.5)  # a found grid has no error at all
    panels[0][0].set_ylabel(KL_LABEL)
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plotted(rows: Sequence[Row]) -> set[str]:
    """Methods that get a line: of those that learn from a text, each with the text of most rows.

    Our own that learn from a text are in the table of the domain shift alone.
    """
    count = collections.Counter(row["method"] for row in rows)
    found: dict[str, str] = {}
    for row in rows:
        method, text = row["method"], row["calibration"]
        stem = method.removesuffix(f", {text}") if text else method
        if not (text and _ours(row)):
            found[stem] = max(found.get(stem, method), method, key=lambda name: count[name])
    return set(found.values())


def kl_axes(axes: Any, title: str, horizontal: str) -> None:
    """A panel of KL on a logarithmic scale with plain numbers; `horizontal` names the other one."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(horizontal)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _ours(row: Row) -> bool:
    return str(row["method"]).startswith(OURS)


def _line(row: Row) -> str:
    """Points only where the bits do not explain the KL."""
    styles = {"": "-" if _ours(row) else ":" if row["calibration"] else "--"}
    return styles.get(row["note"], "none")


def _mark(row: Row) -> str:
    return " \\*" if row["note"] else ""


def _ratio(row: Row, peers: Sequence[Row], text: str) -> str:
    bits, kl = point(row, text)
    peer = best(bits, peers, text) if _ours(row) else None
    return "" if peer is None else f"{kl / peer:.2f}"


def _accuracy(task: Mapping[str, Any], name: str) -> list[str]:
    low, high = task[f"{name}_interval"]
    return [f"{100 * task[name]:.1f} %", f"{100 * low:.1f}–{100 * high:.1f} %"]


def _rank(row: Row) -> tuple[bool, bool, str]:
    return not _ours(row), bool(row["calibration"]), row["method"]
