"""Rounds of measurements over several servers, written down one by one so that a run can go on."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from offline_quantize.benchmark.cases import Case, Measurement
from precalib_kernels.errors import InputError, OutputError

JOURNAL = "measurements.jsonl"
Measure = Callable[[str, Case, int], Measurement]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    servers: labels; the first is the one that the others are compared with.
    seconds: after which no other measurement begins; None for no end.
    remote:  labels of those that are measured as servers only.
    """

    servers: Sequence[str]
    cases: Sequence[Case]
    rounds: int
    seconds: float | None = None
    remote: frozenset[str] = frozenset()

    def steps(self) -> Iterator[tuple[int, Case, str]]:
        """Round, load and server, mode by mode.

        Servers alternate, and each round begins with another one.
        """
        for mode in dict.fromkeys(case.mode for case in self.cases):
            servers = [s for s in self.servers if mode == "serve" or s not in self.remote]
            for number in range(1, self.rounds + 1):
                shift = number % len(servers)
                for case in (case for case in self.cases if case.mode == mode):
                    for server in (*servers[shift:], *servers[:shift]):
                        yield number, case, server


class Journal:
    """The measurements of a run, a line each; the first line says what the run was.

    Raises OutputError for a file of another run, InputError for a damaged one.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self.file, self.about = file, dict(about)
        self.measurements: list[Measurement] = []
        lines = self._whole_lines() if file.exists() else []
        if lines:
            self._read(lines)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.about)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, on disk as well."""
        self.measurements.append(measurement)
        self._append(measurement.to_json())

    def has(self, number: int, case: Case, server: str) -> bool:
        """Whether this was measured before."""
        return any((m.round, m.case, m.server) == (number, case, server) for m in self.measurements)

    def _whole_lines(self) -> list[str]:
        """Lines of the file, from which one that a killed run left unfinished is cut off."""
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.file, len(whole))
        return whole.decode(errors="replace").splitlines()

    def _append(self, value: Mapping[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, lines: Sequence[str]) -> None:
        try:
            there = json.loads(lines[0])
            self.measurements = [Measurement.model_validate_json(line) for line in lines[1:]]
        except (ValueError, ValidationError) as error:
            raise InputError(f"{self.file}: is damaged; remove it and measure again") from error
        if there != self.about:
            raise OutputError(
                f"{self.file}: is of another run; give a new --out, or remove the file"
            )


def run(
    plan: Plan,
    journal: Journal,
    measure: Measure,
    say: Say,
    prepare: Callable[[Case], None] = lambda _: None,
    began: float | None = None,
) -> list[Measurement]:
    """Measure what the journal lacks, as long as there is time; returns all measurements.

    prepare: called before each measurement, in a time that none of them is expected to take.
    began:   when the time of the plan began, None for now.
    """
    began = time.monotonic() if began is None else began
    took = dict[tuple[Case, str], float]()
    waiting = [step for step in plan.steps() if not journal.has(*step)]
    for index, (number, case, server) in enumerate(waiting):
        prepare(case)
        left = sum(_expected(took, *step[1:]) for step in waiting[index:])
        if plan.seconds is not None:
            remaining = plan.seconds - (time.monotonic() - began)
            if remaining < _expected(took, case, server):
                say(f"out of time with {len(waiting) - index} measurements left; run it again")
                break
            left = min(left, remaining)
        about = f", about {duration(left)} left" if took else ""
        say(f"{index + 1} of {len(waiting)}: round {number}, {case}, {server}{about}")
        start = time.monotonic()
        journal.add(measure(server, case, number))
        took[case, server] = time.monotonic() - start
    return journal.measurements


def duration(seconds: float) -> str:
    """In minutes from two of them on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _expected(took: Mapping[tuple[Case, str], float], case: Case, server: str) -> float:
    """Seconds that a measurement will take: as before, or as others of its mode, or as all."""
    if (case, server) in took:
        return took[case, server]
    alike = [seconds for (other, _), seconds in took.items() if other.mode == case.mode]
    known = alike or list(took.values())
    return sum(known) / len(known) if known else 0.0
