"""Throughput against latency, a line for each server."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from offline_quantize.benchmark.results import Row
from offline_quantize.checkpoint.atomic_files import write_bytes

MARKERS = "osD^v"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write a picture with one panel for each length of prompts."""
    lengths = sorted({row.case.prompts for row in rows})
    servers = list(dict.fromkeys(row.server for row in rows))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(lengths), 4), layout="constrained")
        for place, length in enumerate(lengths, 1):
            axes = figure.add_subplot(1, len(lengths), place)
            for i, server in enumerate(servers):
                points = [r for r in rows if r.server == server and r.case.prompts == length]
                x = [row.token_ms for row in points]
                y = [row.tokens_per_second for row in points]
                axes.plot(x, y, marker=MARKERS[i % len(MARKERS)], label=server)
                for row in points:
                    at = (row.token_ms, row.tokens_per_second)
                    axes.annotate(
                        str(row.case.concurrency), at, xytext=(4, 4), textcoords="offset points"
                    )
            axes.set_title(f"{length} prompts; numbers: requests at once")
            axes.set_xlabel("time per token, ms")
            axes.set_ylabel("tokens/s")
            axes.grid(alpha=0.2)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, file.getvalue())
