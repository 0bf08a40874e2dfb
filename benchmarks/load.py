"""Many clients at once on a server, well-behaved and not: does it lose a request or grow?

    python benchmarks/load.py MODEL [MODEL …] [--minutes 10] [--clients 200] [--name load]
        [--pause 0] [--serve-flags "…"] [--note "what else ran on the machine"]

Each model is served by vLLM alone, one after another, under the same load. Clients stream chats at
full speed or read slowly, leave in the middle, or send what is malformed or too long. With a pause,
each client waits that many seconds between two requests, on average: a soak. Written are
benchmarks/results/NAME.json and NAME.md. Exit code 1 if a server made an error that was not the
client's own, lost a request, grew, or did not come to rest. A request is lost if the server's count
of HTTP answers or of finished requests is another than the clients'.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from load_report import markdown

from offline_quantize.benchmark.environment import about_machine
from offline_quantize.benchmark.server import Server

RESULTS = Path(__file__).parent / "results"
SHARES = {"chat": 5, "slow": 3, "leaver": 2, "malformed": 1, "oversized": 1}
VALID = ("chat", "slow", "leaver")
QUESTIONS = (
    "Tell me about rivers.",
    "Write a short story.",
    "What is 17 times 23?",
    "Why is it so?",
)
TOKENS = 48
WARM_UP = 1 / 3  # of the time; memory is compared after it
GROWTH = 0.02  # of memory, from the second to the last third, that counts as flat
REST_SECONDS = 120
SAMPLE_SECONDS = 2.0
SILENCE_SECONDS = 600  # of one request
ROUTE = "/v1/chat/completions"
SERVED = re.compile(rf'http_requests_total{{.*handler="{ROUTE}".*status="(\dxx)".*}}')
SETTINGS = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
MALFORMED: tuple[tuple[str, Any], ...] = (
    ("application/json", b"{not json"),
    ("application/json", b"[]"),
    ("application/json", {"model": "load", "messages": "hello"}),
    ("application/json", {"model": "load", "messages": [], "max_tokens": -1}),
    ("application/json", {"model": "another", "messages": [{"role": "user", "content": "x"}]}),
    ("application/json", {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}),
    ("text/plain", b"hello"),
)


@dataclasses.dataclass
class Tally:
    """How requests of one kind ended: `fine` as they should, otherwise with a reason."""

    fine: int = 0
    tokens: int = 0
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Clients:
    """A number of clients that send requests of all kinds until told to stop."""

    def __init__(self, address: str, clients: int, pause: float = 0, seed: int = 0) -> None:
        self.address, self.clients, self.pause = address + ROUTE, clients, pause
        self.random = random.Random(seed)
        self.tallies = {kind: Tally() for kind in SHARES}
        self.over = asyncio.Event()

    async def run(self, seconds: float) -> None:
        """Send for that long; requests that have begun are finished."""
        limits = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
            working = [asyncio.create_task(self._client(session)) for _ in range(self.clients)]
            await asyncio.sleep(seconds)
            self.over.set()
            await asyncio.gather(*working)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        kinds, weights = list(SHARES), list(SHARES.values())
        while not self.over.is_set():
            kind = self.random.choices(kinds, weights)[0]
            how: dict[str, Callable[..., Awaitable[str | None]]] = {
                "malformed": self._malformed,
                "oversized": self._oversized,
            }
            tally = self.tallies[kind]
            try:
                fault = await how.get(kind, self._stream)(session, kind)
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                fault = type(error).__name__
            if fault is None:
                tally.fine += 1
            else:
                tally.faults[fault] += 1
            with contextlib.suppress(TimeoutError):
                seconds = self.random.uniform(0, 2 * self.pause)
                await asyncio.wait_for(self.over.wait(), seconds)

    async def _stream(self, session: aiohttp.ClientSession, kind: str) -> str | None:
        """A streamed chat; what is wrong with its answer."""
        message = {"role": "user", "content": self.random.choice(QUESTIONS)}
        body = {"model": "load", "messages": [message], "max_tokens": TOKENS, "stream": True}
        leave_after = self.random.randrange(1, TOKENS // 2) if kind == "leaver" else None
        finished, count = False, 0
        async with session.post(self.address, json=body) as answer:
            if answer.status != 200:
                return f"status {answer.status}"
            async for line in answer.content:
                if line.strip() == b"data: [DONE]":
                    return None if finished else "an end without a reason"
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return "an error in the stream"
                for choice in event.get("choices", ()):
                    count += 1
                    finished = finished or choice.get("finish_reason") is not None
                self.tallies[kind].tokens += 1
                if leave_after is not None and count >= leave_after:
                    answer.close()
                    return None
                if kind == "slow":
                    await asyncio.sleep(self.random.uniform(0.05, 0.4))
        return "a stream that was cut"

    async def _malformed(self, session: aiohttp.ClientSession, _: str) -> str | None:
        content_type, value = self.random.choice(MALFORMED)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return await self._refused(session, data, content_type)

    async def _oversized(self, session: aiohttp.ClientSession, _: str) -> str | None:
        message = {"role": "user", "content": "word " * self.random.choice((10_000, 200_000))}
        body = {"model": "load", "messages": [message], "max_tokens": 1}
        return await self._refused(session, json.dumps(body).encode(), "application/json")

    async def _refused(
        self, session: aiohttp.ClientSession, data: bytes, content_type: str
    ) -> str | None:
        headers = {"Content-Type": content_type}
        async with session.post(self.address, data=data, headers=headers) as answer:
            await answer.read()
            return None if 400 <= answer.status < 500 else f"status {answer.status}"


async def watch(process: psutil.Process, samples: list[tuple[float, int]]) -> None:
    """Memory of a server and all of its processes, bytes, until cancelled."""
    started = time.monotonic()
    while True:
        total = 0
        for each in (process, *process.children(recursive=True)):
            try:
                total += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        samples.append((time.monotonic() - started, total))
        await asyncio.sleep(SAMPLE_SECONDS)


def metrics(address: str) -> dict[str, float]:
    """vLLM's counters of requests, and its HTTP answers by class of status ("2xx")."""
    import urllib.request

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, float] = collections.defaultdict(float)
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name.startswith("vllm:") and name.endswith(("running", "waiting", "success_total")):
            found[name] += float(line.rpartition(" ")[2])
        elif answered := SERVED.match(line):
            found[answered[1]] += float(line.rpartition(" ")[2])
    return found


async def rest(address: str) -> dict[str, float]:
    """The counters once no request is at work any more, or after two minutes."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        found = await asyncio.to_thread(metrics, address)
        busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
        if not busy or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1)


async def load(server: Server, minutes: float, clients: int, pause: float) -> dict[str, Any]:
    """Put the load on a server that is ready; what happened."""
    samples: list[tuple[float, int]] = []
    watching = asyncio.create_task(watch(psutil.Process(server.process.pid), samples))
    before = await asyncio.to_thread(metrics, server.url)
    group = Clients(server.url, clients, pause)
    started = time.monotonic()
    await group.run(60 * minutes)
    seconds = time.monotonic() - started
    watching.cancel()
    after = await rest(server.url)
    counted = {name: number - before.get(name, 0.0) for name, number in after.items()}
    return summary(group.tallies, samples, seconds, counted)


def summary(
    tallies: dict[str, Tally],
    samples: list[tuple[float, int]],
    seconds: float,
    counted: Mapping[str, float],
) -> dict[str, Any]:
    """Numbers of a run, and what is wrong with them.

    counted: by how much the server's metrics went up.
    """
    sent = {kind: tally.fine + sum(tally.faults.values()) for kind, tally in tallies.items()}
    valid = sum(sent[kind] for kind in VALID)
    ended = counted.get("vllm:request_success_total", 0.0)
    busy = sum(counted.get(f"vllm:num_requests_{state}", 0.0) for state in ("running", "waiting"))
    answered = {status: int(counted[status]) for status in sorted(counted) if len(status) == 3}
    expected = {"2xx": valid, "4xx": sum(sent.values()) - valid}
    middle, last = thirds(samples)
    growth = last / middle - 1 if middle else 0.0
    read = tallies["chat"].fine + tallies["slow"].fine
    faults = [
        f"{kind}: {number} times {what}"
        for kind, tally in tallies.items()
        for what, number in tally.faults.items()
    ]
    if busy:
        faults.append(f"{busy:.0f} requests were still at work {REST_SECONDS} s after the last")
    if not read <= ended <= valid:  # vLLM does not count requests whose client left
        faults.append(
            f"{valid} valid requests were sent and {read} were read to their end, but vLLM counted "
            f"{ended:.0f}"
        )
    if answered != {status: number for status, number in expected.items() if number}:
        faults.append(f"clients count the answers {expected}, but the server {answered}")
    if growth > GROWTH:
        faults.append(f"memory grew by {growth:.1%} from the second to the last third")
    return {
        "seconds": seconds,
        "requests": sent,
        "valid": valid,
        "read": read,
        "ended": int(ended),
        "answered": answered,
        "tokens": sum(tally.tokens for tally in tallies.values()),
        "memory_middle_mb": middle / 1e6,
        "memory_last_mb": last / 1e6,
        "growth": growth,
        "memory_by_minute_mb": by_minute(samples),
        "faults": faults,
    }


def by_minute(samples: list[tuple[float, int]]) -> list[float]:
    """Mean memory of every minute, in MB."""
    minutes: dict[int, list[int]] = collections.defaultdict(list)
    for at, number in samples:
        minutes[int(at // 60)].append(number)
    return [round(sum(seen) / len(seen) / 1e6, 1) for _, seen in sorted(minutes.items())]


def thirds(samples: list[tuple[float, int]]) -> tuple[float, float]:
    """Mean memory in the second and in the last third of the time."""
    if not samples:
        return 0.0, 0.0
    end = samples[-1][0]
    middle = [n for at, n in samples if end * WARM_UP <= at < 2 * end * WARM_UP] or [0]
    last = [n for at, n in samples if at >= 2 * end * WARM_UP]
    return sum(middle) / len(middle), sum(last) / len(last)


def serve_and_load(
    model: Path, minutes: float, clients: int, pause: float, flags: list[str]
) -> dict[str, Any]:
    """The numbers of one model."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server("load", model, Path(folder) / "log", *flags)
        try:
            server.wait_until_ready(1800)
            return asyncio.run(load(server, minutes, clients, pause))
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0)
    parser.add_argument("--name", default="load")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve-flags", default="")
    parser.add_argument("--note", default="not recorded", help="what else ran on the machine")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped then, too
    flags = shlex.split(given.serve_flags)
    found = {}
    for model in given.models:
        print(f"load: {model.name}, {given.clients} clients, {given.minutes:g} minutes", flush=True)
        found[model.name] = serve_and_load(model, given.minutes, given.clients, given.pause, flags)
        for fault in found[model.name]["faults"]:
            print(f"load: {model.name}: {fault}", flush=True)
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **about_machine(),
        "clients": given.clients,
        "minutes": given.minutes,
        "pause": given.pause,
        "flags": given.serve_flags,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "nice": os.nice(0),
        "other work": given.note,
    }
    result = json.dumps({"about": about, "models": found}, indent=1) + "\n"
    (given.out / f"{given.name}.json").write_text(result)
    (given.out / f"{given.name}.md").write_text(markdown(about, found))
    if any(numbers["faults"] for numbers in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
