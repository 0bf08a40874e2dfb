"""What the measurements say: medians, paired ratios with intervals, a table and plots."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from offline_quantize.benchmark.cases import MODES, Case, Measurement
from offline_quantize.checkpoint.atomic_files import write_bytes, write_json
from offline_quantize.checkpoint.records import Record

# Student's t for 95 % and 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

ENDED_EARLY = 0.98  # of the tokens that an answer should have, below which it is said


class Ratio(Record):
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


class Row(Record):
    """One server under one load: medians over rounds, and the ratio to the first server.

    Times are None where they are not measured.
    """

    case: Case
    server: str
    rounds: int
    tokens_per_second: float
    answer_tokens: float
    first_token_ms: float | None
    token_ms: float | None
    answer_ms: float | None
    ratio: Ratio | None


class About(Record):
    """What results are of.

    servers: labels; ratios are relative to the first.
    prompts: sizes in words, by name;  driver: what measured servers;  flags: of vLLM's engines.
    commit:  of the checkout that measured, None for an installed package.
    """

    servers: list[str]
    prompts: dict[str, str]
    driver: str
    flags: str
    processor: str
    versions: dict[str, str]
    commit: str | None


class Results(Record):
    """The file bench.json."""

    about: About
    rows: list[Row]
    measurements: list[Measurement]


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """The ratio over the rounds that both have; None without any."""
    logs = [math.log(ours[n] / theirs[n]) for n in sorted(ours.keys() & theirs.keys())]
    if not logs:
        return None
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(mean=math.exp(mean), low=None, high=None, pairs=1)
    freedom = len(logs) - 1
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else STUDENT[-1]
    half = student * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean - half), math.exp(mean + half)
    return Ratio(mean=math.exp(mean), low=low, high=high, pairs=len(logs))


def rows(measurements: Sequence[Measurement], servers: Sequence[str]) -> list[Row]:
    """A row for each load and server, in the order of loads and servers."""
    by: dict[tuple[Case, str], list[Measurement]] = {}
    for measurement in measurements:
        by.setdefault((measurement.case, measurement.server), []).append(measurement)
    result = []
    for case in sorted({case for case, _ in by}, key=_order):
        for server in servers:
            if found := by.get((case, server)):
                first = _speeds(by.get((case, servers[0]), ()))
                row = Row(
                    case=case,
                    server=server,
                    rounds=len(found),
                    tokens_per_second=statistics.median(m.tokens_per_second for m in found),
                    answer_tokens=statistics.median(m.answer_tokens for m in found),
                    first_token_ms=_median([m.first_token_ms for m in found]),
                    token_ms=_median([m.token_ms for m in found]),
                    answer_ms=_median([m.answer_ms for m in found]),
                    ratio=paired(_speeds(found), first) if server != servers[0] else None,
                )
                result.append(row)
    return result


def write(out: Path, about: About, measurements: Sequence[Measurement]) -> list[Path]:
    """Write bench.json, bench.md and, if matplotlib is there, bench.png; returns their paths."""
    found = rows(measurements, about.servers)
    everything = Results(about=about, rows=found, measurements=list(measurements))
    write_json(out / "bench.json", everything.to_json())
    write_bytes(out / "bench.md", markdown(about, found).encode())
    written = [out / "bench.json", out / "bench.md"]
    try:
        from offline_quantize.benchmark.plot import plot
    except ModuleNotFoundError:
        return written
    return [*written, out / "bench.png"] if plot(out / "bench.png", found) else written


def markdown(about: About, found: Sequence[Row]) -> str:
    """The table, and what was measured on what."""
    names = ["load", "server", "rounds", "tokens/s"]
    names += ["first token, ms", "per token, ms", "answer, ms", "ratio"]
    lines = ["# Serving", "", f"| {' | '.join(names)} |", f"|---|---|{'--:|' * 6}"]
    lines += [
        f"| {row.case} | {row.server} | {row.rounds} | {row.tokens_per_second:.1f} | "
        f"{_shown(row.first_token_ms, 0)} | {_shown(row.token_ms, 1)} | "
        f"{_shown(row.answer_ms, 0)} | {row.ratio or ''} |"
        for row in found
    ]
    lines += [
        "",
        "Medians over rounds. The ratio is that of tokens/s to the first server: the geometric "
        "mean over rounds, in which both had the same prompts, and its 95 % interval (Student's t "
        "on logarithms).",
        "",
        *(
            f"- {row.server}, {row.case}: answers ended after {row.answer_tokens:.0f} of "
            f"{row.case.tokens[1]} tokens"
            for row in found
            if row.answer_tokens < ENDED_EARLY * row.case.tokens[1]
        ),
        *(f"- {name}: {_words(value)}" for name, value in about.to_json().items()),
    ]
    return "\n".join(lines) + "\n"


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _order(case: Case) -> tuple[int, str, int]:
    return MODES.index(case.mode), case.prompts, case.concurrency


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _speeds(measurements: Sequence[Measurement]) -> dict[int, float]:
    return {m.round: m.tokens_per_second for m in measurements}
