"""What happens to a server when things go wrong: a packed model beside its original.

The same faults befall both: a client that leaves, files that change under the server, weights
reloaded with requests in flight, a killed worker, a start from damaged files. vLLM without the
plugin says what the outcome has to be. A server starts three times for each of the two models, so
one fixture goes through all faults and the tests compare what it saw.
"""

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from offline_quantize import quantize_checkpoint
from offline_quantize.benchmark.server import Server, ServerError, alive

pytestmark = [pytest.mark.slow, pytest.mark.engine]

FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # which has the route that reloads weights
}
SECONDS = 300  # for any one answer, also on a busy machine
IN_FLIGHT = 4
WEIGHTS = "model.safetensors"
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def request(server: Server, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=SECONDS)
    data = json.dumps(body)
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    return connection


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text of an answer."""
    with contextlib.closing(request(server, path, body)) as connection:
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def asked(tokens: int, stream: bool) -> dict[str, Any]:
    body = {"model": "faulty", "prompt": "once upon", "max_tokens": tokens, "stream": stream}
    return {**body, "temperature": 0, "ignore_eos": True}


def answer(server: Server) -> str:
    """A greedy completion; a cache of earlier ones must not answer for the weights."""
    post(server, "/reset_prefix_cache", {})
    status, text = post(server, "/v1/completions", asked(12, stream=False))
    assert status == 200, text
    return str(json.loads(text)["choices"][0]["text"])


def stream(server: Server, tokens: int) -> str:
    """How a streamed completion ends."""
    try:
        status, text = post(server, "/v1/completions", asked(tokens, stream=True))
    except (OSError, http.client.HTTPException):
        return "cut"
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if status != 200 or any('"error"' in event for event in events):
        return "error"
    return "whole" if events and events[-1] == "[DONE]" else "cut"


def health(server: Server) -> int:
    """Status of /health, 0 without an answer."""
    host = server.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def running(server: Server) -> float:
    """Requests that the engine works on."""
    host = server.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    states = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(states))


def until(reached, seconds: float = 60) -> bool:
    """Whether that became true in time."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def reload(server: Server) -> int:
    """Status of the route by which weights are read again from the model's folder."""
    return post(server, "/collective_rpc", {"method": "reload_weights"})[0]


def of_session(server: Server) -> list[psutil.Process]:
    """Processes of a server, also those whose parent is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == server.process.pid and alive(process):
                found.append(process)
    return found


@dataclasses.dataclass
class Scene:
    """A model that is served, and other weights of the same sizes."""

    folder: Path
    other: Path
    logs: Path

    def serve(self) -> Server:
        number = len(list(self.logs.iterdir()))
        log = self.logs / f"{number}.log"
        return Server("faulty", self.folder, log, *FLAGS, **SETTINGS)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @contextlib.contextmanager
    def damaged(self, how: str) -> Iterator[None]:
        """The weights cut in place, another file in their place, or gone; whole again after."""
        kept = self.folder.parent / "kept.safetensors"
        shutil.copy(self.weights, kept)
        if how == "truncated":
            os.truncate(self.weights, self.weights.stat().st_size // 2)
        elif how == "replaced":
            fresh = self.folder.parent / "fresh.safetensors"
            shutil.copy(self.other / WEIGHTS, fresh)
            fresh.replace(self.weights)
        else:
            self.weights.unlink()
        yield
        kept.replace(self.weights)


def flights(pool: ThreadPoolExecutor, server: Server, tokens: int) -> list[Future[str]]:
    """Streamed requests that have begun."""
    begun = [pool.submit(stream, server, tokens) for _ in range(IN_FLIGHT)]
    until(lambda: running(server) == IN_FLIGHT)
    return begun


def first_life(scene: Scene, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Clients leave, files change and come back, and a worker is killed."""
    seen: dict[str, Any] = {}
    server = scene.serve()
    try:
        server.wait_until_ready(SECONDS)
        right = answer(server)
        leaving = request(server, "/v1/completions", asked(1500, stream=True))
        leaving.getresponse().readline()
        leaving.close()
        forgotten = until(lambda: running(server) == 0)
        seen["client left"] = forgotten, health(server), answer(server) == right
        for how in ("truncated", "replaced", "deleted"):
            with scene.damaged(how):
                seen[f"{how} while serving"] = health(server), answer(server) == right
        begun = flights(pool, server, 1500)
        worker = max(server.family, key=lambda process: process.memory_info().rss)
        worker.send_signal(signal.SIGKILL)
        ends = sorted({each.result(SECONDS) for each in begun})
        until(lambda: server.process.poll() is not None)
        gone = until(lambda: not of_session(server))
        seen["worker killed"] = ends, server.process.returncode, health(server), gone
        seen["answer"] = right
    finally:
        server.stop()
    return seen


def start_damaged(scene: Scene) -> dict[str, Any]:
    """A start from weights that were cut."""
    with scene.damaged("truncated"):
        server = scene.serve()
        try:
            server.wait_until_ready(SECONDS)
            code = None
        except ServerError:
            code = server.process.poll()
        gone = until(lambda: not of_session(server))
        server.stop()
    return {"started from truncated weights": (code, gone)}


def second_life(scene: Scene, pool: ThreadPoolExecutor, right: str) -> dict[str, Any]:
    """Restarted; weights are reloaded with requests in flight, at last from a cut file."""
    seen: dict[str, Any] = {}
    server = scene.serve()
    try:
        server.wait_until_ready(SECONDS)
        seen["restarted"] = answer(server) == right
        begun = flights(pool, server, 400)
        status = reload(server)
        ends = sorted({each.result(SECONDS) for each in begun})
        seen["reloaded"] = status, ends, health(server), answer(server) == right
        with scene.damaged("replaced"):
            begun = flights(pool, server, 400)
            status = reload(server)
            ends = sorted({each.result(SECONDS) for each in begun})
            seen["reloaded replaced"] = status, ends, health(server), answer(server) != right
        seen["reloaded what was first"] = reload(server), answer(server) == right
        with scene.damaged("truncated"):
            begun = flights(pool, server, 1500)
            status = reload(server)
            ends = sorted({each.result(SECONDS) for each in begun})
        until(lambda: server.process.poll() is not None)
        gone = until(lambda: not of_session(server))
        seen["reloaded truncated"] = status, ends, server.process.poll(), health(server), gone
    finally:
        server.stop()
    return seen


@pytest.fixture(scope="module")
def outcomes(byte_llama, tmp_path_factory):
    """What was seen of each model, by the name of the fault."""
    sources = [byte_llama(**SIZES), byte_llama(**SIZES, seed=1)]
    packed = []
    for source in sources:
        target = source.parent / "packed"
        quantize_checkpoint(source, target, "balanced-4", activations="none", jobs=1)
        packed.append(target)
    found = {}
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for kind, (folder, other) in {"original": sources, "packed": packed}.items():
            scene = Scene(folder, other, tmp_path_factory.mktemp(f"{kind}-logs"))
            seen = first_life(scene, pool)
            right = seen.pop("answer")
            found[kind] = {**seen, **start_damaged(scene), **second_life(scene, pool, right)}
    return found


WHOLE = {  # what a server has to do, whichever model it serves
    "client left": (True, 200, True),
    **{f"{how} while serving": (200, True) for how in ("truncated", "replaced", "deleted")},
    "restarted": True,
    "reloaded": (200, ["whole"], 200, True),
    "reloaded replaced": (200, ["whole"], 200, True),
    "reloaded what was first": (200, True),
}
# here vLLM without the plugin decides
AS_VLLM = ("worker killed", "started from truncated weights", "reloaded truncated")


def test_every_fault_has_an_outcome(outcomes):
    for seen in outcomes.values():
        assert sorted(seen) == sorted([*WHOLE, *AS_VLLM])


@pytest.mark.parametrize("fault", WHOLE)
@pytest.mark.parametrize("kind", ["original", "packed"])
def test_a_server_survives(outcomes, kind, fault):
    assert outcomes[kind][fault] == WHOLE[fault]


@pytest.mark.parametrize("fault", AS_VLLM)
def test_a_packed_model_fails_as_its_original(outcomes, fault):
    assert outcomes["packed"][fault] == outcomes["original"][fault]


def test_failures_are_failures(outcomes):
    """vLLM ends with exit code 0 when its worker dies, so the code says nothing."""
    for seen in outcomes.values():
        for fault in ("worker killed", "reloaded truncated"):
            *first, ends, code, status, gone = seen[fault]
            assert all(status >= 400 for status in first)
            assert "whole" not in ends
            assert code is not None
            assert (status, gone) == (0, True)
        code, gone = seen["started from truncated weights"]
        assert code not in (0, None)
        assert gone
