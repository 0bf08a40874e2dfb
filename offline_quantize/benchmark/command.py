"""`precalib bench`: starts the servers, measures them beside each other, writes the results."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from offline_quantize.benchmark import results
from offline_quantize.benchmark.load import CONCURRENCIES, LENGTHS, Case, cases, measure
from offline_quantize.benchmark.rounds import JOURNAL, Journal, Plan, Say, run
from offline_quantize.benchmark.server import COMMANDS, Server
from precalib_kernels.errors import InputError, UsageError
from precalib_kernels.processor import processor_name

READY_SECONDS = 1800
MODEL = "bench"  # what requests call a model that is served here


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    directory: packed checkpoint, whose tokenizer makes the prompts for all servers.
    against:   folders of checkpoints to serve beside it, or addresses of running servers. The first
               one is what ratios are relative to; without any there are no ratios.
    out:       folder of the results; a run that was broken off is continued.
    rounds:    how often each load is measured;  minutes: after which nothing more is begun.
    flags:     for every `vllm serve` that is started.
    quick:     one and four requests at once and short prompts, two rounds, and eager servers.
    """

    directory: Path
    against: Sequence[str]
    out: Path
    rounds: int = 3
    minutes: float | None = None
    concurrencies: Sequence[int] = CONCURRENCIES
    prompts: Sequence[str] = tuple(LENGTHS)
    flags: Sequence[str] = ()
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers: its address, and what it calls its model."""

    address: str
    model: str


def bench(request: Request, say: Say) -> list[Path]:
    """Measure and write; returns the paths of what was written.

    Raises UsageError for loads that do not exist and servers named twice, ServerError for servers
    and measurements that fail, OutputError for results of another run.
    """
    plan, flags = _plan(request)
    if not (Path(os.environ.get("VLLM") or COMMANDS / "vllm")).exists():
        raise UsageError("bench needs vLLM in the same environment; see deploy/README.md")
    about = _about(plan, flags)
    journal = Journal(request.out / JOURNAL, about)
    if all(journal.has(*step) for step in plan.steps()):
        return results.write(request.out, about, journal.measurements, plan.servers)
    with contextlib.ExitStack() as stack:
        servers = _start(request, plan, flags, stack, say)

        def put(label: str, case: Case, number: int) -> Any:
            there = servers[label]
            return measure(label, there.address, there.model, request.directory, case, number)

        measured = run(plan, journal, put, say)
    return results.write(request.out, about, measured, plan.servers)


def _plan(request: Request) -> tuple[Plan, Sequence[str]]:
    prompts, concurrencies = tuple(request.prompts), tuple(request.concurrencies)
    rounds, flags = request.rounds, [*request.flags]
    if request.quick:
        prompts, concurrencies, rounds = ("short",), (1, 4), 2
        flags += ["--enforce-eager", "--max-model-len", "1024"]
    if unknown := set(prompts) - set(LENGTHS):
        raise UsageError(f"there are no {min(unknown)} prompts; choose from {', '.join(LENGTHS)}")
    if not prompts or not concurrencies or min(concurrencies) < 1:
        raise UsageError("give at least one length of prompts, and numbers of requests above 0")
    labels = [*map(_label, request.against), _label(str(request.directory))]
    if len(set(labels)) < len(labels):
        raise UsageError(f"two servers would be called the same: {', '.join(labels)}")
    seconds = None if request.minutes is None else 60 * request.minutes
    return Plan(labels, list(cases(prompts, concurrencies)), rounds, seconds), flags


def _label(target: str) -> str:
    return target.rstrip("/") if _is_address(target) else Path(target).resolve().name


def _is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _start(
    request: Request, plan: Plan, flags: Sequence[str], stack: contextlib.ExitStack, say: Say
) -> Mapping[str, Running]:
    """All servers; those that are started here are stopped by `stack`."""
    found: dict[str, Running] = {}
    started: list[Server] = []
    targets = [*request.against, str(request.directory)]
    for label, target in zip(plan.servers, targets, strict=True):
        if _is_address(target):
            found[label] = Running(label, _served_name(label))
            continue
        log = request.out / f"server-{label}.log"
        say(f"starting {label}, log in {log}")
        server = Server(MODEL, Path(target), log, *flags)
        stack.callback(server.stop)
        started.append(server)
        found[label] = Running(server.url, MODEL)
    for server in started:
        server.wait_until_ready(READY_SECONDS)
    return found


def _served_name(address: str) -> str:
    """What a running server calls its model. Raises InputError if it does not answer."""
    try:
        with _opener(address).open(f"{address}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{address}: is no server that can be measured ({error})") from error


def _opener(address: str) -> urllib.request.OpenerDirector:
    """One that goes round proxies to servers on this machine."""
    own = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "::1", "localhost")
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * own)


def _about(plan: Plan, flags: Sequence[str]) -> dict[str, Any]:
    """What results are of; runs that differ in it are not mixed."""
    lengths = {name: LENGTHS[name] for name in dict.fromkeys(case.prompts for case in plan.cases)}
    return {
        "servers": list(plan.servers),
        "prompts": {name: f"{n} tokens in, {m} out" for name, (n, m) in lengths.items()},
        "flags": " ".join(flags),
        **about_machine(),
    }


def about_machine() -> dict[str, Any]:
    """Processor, versions, and the commit of this package's checkout or None."""
    return {"processor": _processor(), "versions": dict(_versions()), "commit": _commit()}


def _processor() -> str:
    """Name of the processor and of the GPU, if there is one."""
    import torch

    name = processor_name() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("vllm-precalib", "vllm", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _commit() -> str | None:
    """Commit of the checkout that this package lies in; None for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
