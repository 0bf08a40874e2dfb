"""What the measurements say: medians, paired ratios with intervals, a table and plots."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_quantize.benchmark.load import Case, Measurement
from offline_quantize.checkpoint.atomic_files import write_bytes, write_json

# Student's t for 95 % and 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Tokens per second of one server divided by those of another, from pairs of a round.

    mean: geometric;  low, high: 95 % interval by Student's t on logarithms; None for one pair.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.low:.2f}–{self.high:.2f}]"


@dataclasses.dataclass(frozen=True)
class Row:
    """One server under one load: medians over rounds, and the ratio to the first server."""

    case: Case
    server: str
    rounds: int
    tokens_per_second: float
    first_token_ms: float
    token_ms: float
    ratio: Ratio | None


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """The ratio over the rounds that both have; None without any."""
    logs = [math.log(ours[n] / theirs[n]) for n in sorted(ours.keys() & theirs.keys())]
    if not logs:
        return None
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(mean), None, None, 1)
    freedom = len(logs) - 1
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else STUDENT[-1]
    half = student * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def rows(measurements: Sequence[Measurement], servers: Sequence[str]) -> list[Row]:
    """A row for each load and server, in the order of loads and servers."""
    by: dict[tuple[Case, str], list[Measurement]] = {}
    for measurement in measurements:
        by.setdefault((measurement.case, measurement.server), []).append(measurement)
    loads = sorted({case for case, _ in by}, key=lambda case: (case.prompts, case.concurrency))
    result = []
    for case in loads:
        for server in servers:
            if found := by.get((case, server)):
                first = _speeds(by.get((case, servers[0]), ()))
                ratio = paired(_speeds(found), first) if server != servers[0] else None
                result.append(
                    Row(
                        case,
                        server,
                        len(found),
                        statistics.median(m.tokens_per_second for m in found),
                        statistics.median(m.first_token_ms for m in found),
                        statistics.median(m.token_ms for m in found),
                        ratio,
                    )
                )
    return result


def write(
    out: Path,
    about: Mapping[str, Any],
    measurements: Sequence[Measurement],
    servers: Sequence[str],
) -> list[Path]:
    """Write bench.json, bench.md and, if matplotlib is there, bench.png; returns their paths."""
    found = rows(measurements, servers)
    values = [dataclasses.asdict(row) for row in found]
    all_of_them = [measurement.to_json() for measurement in measurements]
    write_json(
        out / "bench.json", {"about": dict(about), "rows": values, "measurements": all_of_them}
    )
    write_bytes(out / "bench.md", markdown(about, found).encode())
    written = [out / "bench.json", out / "bench.md"]
    try:
        from offline_quantize.benchmark.plot import plot
    except ModuleNotFoundError:
        return written
    plot(out / "bench.png", found)
    return [*written, out / "bench.png"]


def markdown(about: Mapping[str, Any], found: Sequence[Row]) -> str:
    """The table, and what was measured on what."""
    names = ("load", "server", "rounds", "tokens/s", "first token, ms", "per token, ms", "ratio")
    lines = ["# Serving", "", f"| {' | '.join(names)} |", "|---|---|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.case} | {row.server} | {row.rounds} | {row.tokens_per_second:.1f} | "
        f"{row.first_token_ms:.0f} | {row.token_ms:.1f} | {row.ratio or ''} |"
        for row in found
    ]
    lines += [
        "",
        "Medians over rounds. The ratio is that of tokens/s to the first server: the geometric "
        "mean over rounds, in which both had the same prompts, and its 95 % interval (Student's t "
        "on logarithms).",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
    ]
    return "\n".join(lines) + "\n"


def _speeds(measurements: Sequence[Measurement]) -> dict[int, float]:
    return {m.round: m.tokens_per_second for m in measurements}
