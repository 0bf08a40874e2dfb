"""What a running server must do: checks through OpenAI's client, for smoke.sh and the demo."""

import contextlib
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping

from httpx import HTTPError, TimeoutException
from openai import APITimeoutError, BadRequestError, DefaultHttpxClient, OpenAI, OpenAIError

from offline_quantize.benchmark.server import STOP_SECONDS, Server, alive

PROMPT = "The capital of France is"
QUESTION = "What is the capital of France? Answer in one sentence."
SECOND_QUESTION = "Name three things that plants need to grow."
TOKENS = 16
IN_FLIGHT = 4
SILENT_SECONDS = 10  # after so many without a token a client leaves
CLEAN_CODES = (0, -15, 143)  # ended by itself, or by the signal itself
CANARY = "vllm:corrupted_requests_total"  # counted with VLLM_COMPUTE_NANS_IN_LOGITS=1
COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
)
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)")
Pieces = Callable[[str], None]


class CheckError(Exception):
    """A server does not do what it must; the text says what it did instead."""


def client(server: Server) -> OpenAI:
    """OpenAI's client for a server; no proxy of the environment stands between."""
    direct = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=direct, max_retries=0)


def completion(server: Server, prompt: str = PROMPT, tokens: int = TOKENS) -> str:
    """One greedy completion; CheckError if it is empty."""
    answer = client(server).completions.create(
        model=server.name, prompt=prompt, temperature=0, max_tokens=tokens
    )
    text = str(answer.choices[0].text)
    if not text.strip():
        raise CheckError("the completion is empty")
    return text


def equal_completions(server: Server) -> str:
    """Two greedy completions, which must be the same."""
    first, second = completion(server), completion(server)
    if first != second:
        raise CheckError(f"two greedy completions differ: {first!r} and {second!r}")
    return first


def streamed_completion(server: Server, expected: str) -> int:
    """The same completion streamed; returns in how many pieces it came."""
    chunks = client(server).completions.create(
        model=server.name, prompt=PROMPT, temperature=0, max_tokens=TOKENS, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    if "".join(pieces) != expected:
        raise CheckError(f"streamed, the completion is {''.join(pieces)!r} and not {expected!r}")
    if len([piece for piece in pieces if piece]) < 2:
        raise CheckError("the streamed completion came in one piece")
    return len(pieces)


def chat(server: Server, show: Pieces = lambda _: None, question: str = QUESTION) -> str | None:
    """A streamed greedy chat, shown piece by piece; None if the model has no chat template."""
    try:
        chunks = client(server).chat.completions.create(
            model=server.name,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
            stream=True,
        )
    except BadRequestError as error:
        if "chat template" in str(error):
            return None
        raise
    pieces = []
    for chunk in chunks:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            pieces.append(piece)
            show(piece)
    if not "".join(pieces).strip():
        raise CheckError("the answer of the chat is empty")
    return "".join(pieces)


def metrics(server: Server) -> dict[str, float]:
    """Every metric of a server, summed over its labels."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if sample := SAMPLE.match(line):
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[2])
    return found


def check_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """All metrics are there, and the counters went up between two looks; returns a summary."""
    for name in (*COUNTERS, *GAUGES):
        if name not in after:
            raise CheckError(f"the metric {name} is missing")
    for name in COUNTERS:
        if after[name] <= before.get(name, 0.0):
            raise CheckError(f"the metric {name} did not move: it is still {after[name]:g}")
    moved = {name: after[name] - before.get(name, 0.0) for name in COUNTERS[:3]}
    return ", ".join(f"{name.removeprefix('vllm:')} +{by:g}" for name, by in moved.items())


def check_canary(found: Mapping[str, float]) -> None:
    """No logit was NaN; needs a server with VLLM_COMPUTE_NANS_IN_LOGITS=1."""
    if CANARY not in found:
        raise CheckError(f"the metric {CANARY} is missing, so NaN would go unseen")
    if found[CANARY]:
        raise CheckError(f"{found[CANARY]:g} requests had NaN in their logits")


def stop_in_flight(server: Server) -> str:
    """SIGTERM while requests are answered: the server ends by itself, and so does every request."""
    requests = [_Request(server) for _ in range(IN_FLIGHT)]
    if not all(request.answered.wait(120) for request in requests):
        raise CheckError(f"{IN_FLIGHT} requests at once were not all answered")
    family, started = server.family, time.monotonic()
    server.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(STOP_SECONDS)
    seconds, code = time.monotonic() - started, server.process.returncode
    for request in requests:
        request.last.set()
    if code is None:
        raise CheckError(f"the server ignored SIGTERM for {STOP_SECONDS} s with requests in flight")
    if code not in CLEAN_CODES:
        raise CheckError(f"the server ended with exit code {code} after SIGTERM")
    while any(map(alive, family)) and time.monotonic() < started + STOP_SECONDS:
        time.sleep(0.05)
    if left := [process.pid for process in family if alive(process)]:
        raise CheckError(f"{len(left)} processes of the server outlived it")
    for request in requests:
        request.thread.join(STOP_SECONDS)
    if hanging := [request for request in requests if request.thread.is_alive()]:
        raise CheckError(f"{len(hanging)} of {IN_FLIGHT} requests hang")
    return f"{IN_FLIGHT} requests in flight, ended in {seconds:.1f} s with exit code {code}"


class _Request:
    """A streamed request as long as the model allows, repeated until the server is gone.

    answered: set with the first token;  last: set when no other request is to follow.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.answered, self.last = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        asking = client(self.server)
        # a connection that is cut raises errors of the HTTP library as well
        with contextlib.suppress(OpenAIError, HTTPError):
            longest = asking.models.list().data[0].model_extra or {}
            tokens = int(longest.get("max_model_len") or 256) - 32
            while not self.last.is_set():
                # vLLM, when it stops, now and then leaves a stream open until its client goes
                with contextlib.suppress(APITimeoutError, TimeoutException):
                    for _ in asking.completions.create(
                        model=self.server.name,
                        prompt=PROMPT,
                        max_tokens=tokens,
                        extra_body={"ignore_eos": True},
                        stream=True,
                        timeout=SILENT_SECONDS,
                    ):
                        self.answered.set()
