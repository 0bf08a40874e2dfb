"""`precalib bench`: starts the servers, measures them beside each other, writes the results."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from offline_quantize.benchmark import results
from offline_quantize.benchmark.cases import (
    CONCURRENCIES,
    LENGTHS,
    MODES,
    PROMPTS,
    Case,
    Measurement,
    Mode,
    cases,
)
from offline_quantize.benchmark.drivers import SECONDS, Driver, driver, measure_offline, vllm
from offline_quantize.benchmark.environment import about_machine
from offline_quantize.benchmark.rounds import JOURNAL, Journal, Plan, Say, run
from offline_quantize.benchmark.server import TimeIsUpError
from offline_quantize.benchmark.targets import READY_SECONDS, Running, Target, running, start
from precalib_kernels.errors import UsageError

# Of a quick run's three minutes: when nothing more is begun, and when what was begun is cut off.
QUICK_SECONDS, QUICK_END_SECONDS = 150.0, 165.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    directory: packed checkpoint, whose tokenizer makes the prompts for all.
    against:   what to measure beside it, as `Target.parse` reads it. The first one is what ratios
               are relative to; without any there are no ratios.
    out:       folder of the results; a run that was broken off is continued.
    rounds:    how often each load is measured.
    minutes:   after which nothing more is begun, those of starting servers counted.
    modes:     what is measured;  driver: what measures servers.
    flags:     for every engine of vLLM that is started, with or without a server.
    quick:     servers only, which are eager, one and four requests at once, brief prompts, two
               rounds, and three minutes in all, after which what is there is written.
    """

    directory: Path
    against: Sequence[str]
    out: Path
    rounds: int = 3
    minutes: float | None = None
    concurrencies: Sequence[int] = CONCURRENCIES
    prompts: Sequence[str] = PROMPTS
    modes: Sequence[Mode] = ("serve",)
    driver: Driver = "vllm"
    flags: Sequence[str] = ()
    quick: bool = False


def bench(request: Request, say: Say) -> list[Path]:
    """Measure and write; returns the paths of what was written.

    Raises UsageError for loads that do not exist, servers named twice and programs that are not
    installed, ServerError for servers and measurements that fail, OutputError for results of
    another run.
    """
    began = time.monotonic()
    if request.quick:
        request = _quick(request)
    targets = [*map(Target.parse, request.against), Target.parse(str(request.directory))]
    plan = _plan(request, targets)
    vllm()  # serves the checkpoint, whoever measures
    driver(request.driver)
    about = _about(request, plan)
    journal = Journal(request.out / JOURNAL, about.to_json())
    if not all(journal.has(*step) for step in plan.steps()):
        with contextlib.ExitStack() as stack:
            end = began + QUICK_END_SECONDS if request.quick else None
            engines = _Engines(request, targets, stack, say, end)
            try:
                run(plan, journal, engines.measure, say, engines.prepare, began)
            except TimeIsUpError:
                if not (request.quick and journal.measurements):
                    raise
                say("out of time in the middle of a measurement; run it again to go on")
    return results.write(request.out, about, journal.measurements)


class _Engines:
    """Servers, which run while servers are measured, and engines that are started each time.

    end: on the monotonic clock, when servers that start and their measurements are cut off.
    """

    def __init__(
        self,
        request: Request,
        targets: Sequence[Target],
        stack: contextlib.ExitStack,
        say: Say,
        end: float | None,
    ) -> None:
        self.request, self.say, self.servers, self.end = request, say, stack, end
        self.targets = {target.label: target for target in targets}
        self.driver = driver(request.driver)
        self.running: Mapping[str, Running] = {}

    def prepare(self, case: Case) -> None:
        """Start all servers for a load on them, end them before others are measured."""
        if case.mode != "serve":
            self.running = {}
            self.servers.close()
        elif not self.running:
            self.running = self._start()

    def measure(self, label: str, case: Case, number: int) -> Measurement:
        """Measure a load, for which all is prepared."""
        tokenizer = self.request.directory
        if case.mode == "serve":
            there = self.running[label]
            seconds = self._at_most(SECONDS)
            return self.driver(label, there.address, there.model, tokenizer, case, number, seconds)
        folder = self.targets[label].folder
        assert folder is not None
        return measure_offline(label, folder, tokenizer, case, number, self.request.flags)

    def _start(self) -> Mapping[str, Running]:
        started = []
        for target in self.targets.values():
            server = start(target, self.request.out, self.request.flags, self.servers)
            if server is not None:
                self.say(f"starting {target.label}, log in {server.log}")
            started.append((target, server))
        return {
            target.label: running(target, server, self._at_most(READY_SECONDS))
            for target, server in started
        }

    def _at_most(self, seconds: float) -> float:
        return seconds if self.end is None else min(seconds, self.end - time.monotonic())


def _quick(request: Request) -> Request:
    return dataclasses.replace(
        request,
        prompts=("brief",),
        concurrencies=(1, 4),
        modes=("serve",),
        rounds=2,
        minutes=QUICK_SECONDS / 60 if request.minutes is None else request.minutes,
        flags=[*request.flags, "--enforce-eager", "--max-model-len", "1024"],
    )


def _plan(request: Request, targets: Sequence[Target]) -> Plan:
    prompts, concurrencies = request.prompts, request.concurrencies
    if unknown := set(prompts) - set(LENGTHS):
        raise UsageError(f"there are no {min(unknown)} prompts; choose from {', '.join(LENGTHS)}")
    if not prompts or not concurrencies or min(concurrencies) < 1:
        raise UsageError("give at least one length of prompts, and numbers of requests above 0")
    if unmeasurable := [mode for mode in request.modes if mode not in MODES]:
        raise UsageError(f"{unmeasurable[0]!r} is no mode; choose from {', '.join(MODES)}")
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        raise UsageError(f"two servers would be called the same: {', '.join(labels)}")
    modes = [mode for mode in MODES if mode in request.modes]  # servers first
    return Plan(
        labels,
        list(cases(prompts, concurrencies, modes)),
        request.rounds,
        None if request.minutes is None else 60 * request.minutes,
        frozenset(target.label for target in targets if target.folder is None),
    )


def _about(request: Request, plan: Plan) -> results.About:
    """What results are of; runs that differ in it are not mixed."""
    lengths = {name: LENGTHS[name] for name in dict.fromkeys(case.prompts for case in plan.cases)}
    return results.About(
        servers=list(plan.servers),
        prompts={name: f"{n} tokens in, {m} out" for name, (n, m) in lengths.items()},
        driver=request.driver,
        flags=" ".join(request.flags),
        **about_machine(),
    )
