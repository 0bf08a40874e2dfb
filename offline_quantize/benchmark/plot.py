"""Throughput against latency, a line for each server."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from offline_quantize.benchmark.results import Row
from offline_quantize.checkpoint.atomic_files import write_bytes

MARKERS = "osD^v"
LATENCIES = {"serve": "time per token, ms", "latency": "time of a batch, ms"}


def plot(path: Path, rows: Sequence[Row]) -> bool:
    """Write a picture with one panel for each mode and length of prompts; False if none of the
    rows has a latency.
    """
    panels = [
        key
        for key in dict.fromkeys((row.case.mode, row.case.prompts) for row in rows)
        if key[0] in LATENCIES
    ]
    if not panels:
        return False
    servers = list(dict.fromkeys(row.server for row in rows))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            for marker, server in enumerate(servers):
                shown = [
                    r for r in rows if r.server == server and (r.case.mode, r.case.prompts) == panel
                ]
                _line(axes, server, MARKERS[marker % len(MARKERS)], shown)
            what = "requests at once" if panel[0] == "serve" else "requests in a batch, no server"
            axes.set_title(f"{panel[1]} prompts; numbers: {what}")
            axes.set_xlabel(LATENCIES[panel[0]])
            axes.set_ylabel("tokens/s")
            axes.grid(alpha=0.2)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, file.getvalue())
    return True


def _line(axes: Any, server: str, marker: str, rows: Sequence[Row]) -> None:
    """The loads of one server in one panel."""
    points = [
        (row.token_ms if row.case.mode == "serve" else row.answer_ms, row.tokens_per_second, row)
        for row in rows
    ]
    if points:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=server)
    for x, y, row in points:
        number = str(row.case.concurrency)
        axes.annotate(number, (x, y), xytext=(4, 4), textcoords="offset points")
