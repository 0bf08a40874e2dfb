"""Stands in for `vllm serve`: OpenAI's routes and metrics, right or with one fault.

    python fake_vllm.py serve MODEL --port N [--fault NAME]
    python fake_vllm.py bench serve --base-url URL --result-dir FOLDER …
    python fake_vllm.py bench throughput|latency --model MODEL --output-json FILE …
    python fake_vllm.py run --backend JSON --output JSON …      as GuideLLM

Faults are those that `tests/deploy/test_checks.py` lists.
"""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TEXT = [" Paris", ".", " It", " is"]


class Model:
    """Counts as vLLM does, and misbehaves as told."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.requests = 0
        self.nan = 1 if fault == "nan" else 0
        self.answered: collections.Counter[int] = collections.Counter()  # chats, by status // 100

    def answer(self, long: bool) -> list[str]:
        self.requests += 0 if self.fault == "still" else 1
        if self.fault == "empty":
            return [" "]
        if self.fault == "unequal":
            return [*TEXT, str(self.requests)]
        return TEXT * 10_000 if long else TEXT

    def metrics(self) -> str:
        counted = (
            "prompt_tokens_total",
            "generation_tokens_total",
            "request_success_total",
            "time_to_first_token_seconds_count",
            "e2e_request_latency_seconds_count",
        )
        lines = [f'vllm:{name}{{engine="0",a="}}"}} {float(self.requests)}' for name in counted]
        lines += ["vllm:num_requests_running 0.0", "vllm:num_requests_waiting 0.0"]
        lines += ['vllm:kv_cache_usage_perc{engine="0"} 0.01', "# HELP nothing"]
        lines += [f'vllm:corrupted_requests_total{{engine="{i}"}} {self.nan}' for i in (0, 1)]
        for status, number in self.answered.items():
            labels = f'handler="/v1/chat/completions",method="POST",status="{status}xx"'
            lines.append(f"http_requests_total{{{labels}}} {float(number)}")
        missing = {"no metric": "e2e_request", "no canary": "corrupted"}.get(self.fault, "\0")
        return "\n".join(line for line in lines if missing not in line) + "\n"


def handler(model: Model) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send_response(self, status: int, message: str | None = None) -> None:
            if self.path == "/v1/chat/completions":
                model.answered[status // 100] += 1
            super().send_response(status, message)

        def send(self, data: str | dict[str, Any], status: int = 200) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text is data else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if self.path == "/health" and model.fault == "no health":
                self.send("", 404)
            elif self.path == "/v1/models":
                self.send({"object": "list", "data": [{"id": "m", "max_model_len": 4096}]})
            else:
                self.send(model.metrics() if self.path == "/metrics" else "")

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                asked = json.loads(data)
                chat = isinstance(asked["messages"], list) if "messages" in asked else False
                known = asked["model"] == "another" or asked["max_tokens"] > 0
                fits = len(data) < 10_000 and asked["model"] != "another"
            except (ValueError, LookupError, TypeError):
                known = fits = False
            if not (known and fits):
                self.send({"error": {"message": "bad"}}, 500 if model.fault == "rude" else 400)
                return
            if chat and model.fault == "no template":
                self.send({"error": {"message": "no chat template is defined"}}, 400)
                return
            pieces = model.answer(asked["max_tokens"] > 1000)
            if chat and model.fault == "mute":
                pieces = []
            if not asked.get("stream"):
                self.send({"choices": [{"index": 0, "text": "".join(pieces)}]})
                return
            if model.fault == "lump":
                pieces = ["".join(pieces)]
            if model.fault == "other":
                pieces = [*pieces, "?"]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for number, piece in enumerate(pieces, 1):
                part = {"delta": {"content": piece}} if chat else {"text": piece}
                part["finish_reason"] = "stop" if number == len(pieces) else None
                event = json.dumps({"choices": [{"index": 0, **part}]})
                self.wfile.write(f"data: {event}\n\n".encode())
                time.sleep(0.01 if asked["max_tokens"] > 1000 else 0)
            self.wfile.write(b"data: [DONE]\n\n")

    return Handler


def serve(model: Model, port: int = 0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(model))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def ask(url: str, model: str) -> bool:
    """One request; whether the server is a slow one."""
    asked = {"model": model, "prompt": "x", "max_tokens": 4}
    data = json.dumps(asked).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data)) as answer:
        slow = len(json.load(answer)["choices"][0]["text"]) != len("".join(TEXT))
    if slow and "BENCH_CRASHES" in os.environ:
        sys.exit("out of luck")
    return slow


def bench(words: list[str]) -> None:
    """The result that `vllm bench serve` writes: 100 tokens/s for each request at once, and 1 more
    in each round; half of that on a server with a fault, whose `crash` ends without a result.
    """
    given = given_in(words)
    slow = ask(given("base-url"), given("model"))
    if os.environ.get("BENCH_HANGS") == given("seed"):
        time.sleep(600)
    speed = (100 * int(given("max-concurrency")) + int(given("seed"))) / (2 if slow else 1)
    count = int(given("num-prompts"))
    lost = int(os.environ.get("BENCH_LOSES", "0"))
    tokens = count * int(given("random-output-len")) // (2 if "BENCH_ENDS" in os.environ else 1)
    result = {"completed": count - lost, "duration": 1.0, "total_output_tokens": tokens}
    result |= {"output_throughput": speed, "median_ttft_ms": 5.0, "p99_ttft_ms": 9.0}
    result |= {"median_tpot_ms": 1000 / speed, "p99_tpot_ms": 2000 / speed}
    result |= {"median_e2el_ms": 64000 / speed}
    Path(given("result-dir"), given("result-filename")).write_text(json.dumps(result))


def bench_offline(mode: str, words: list[str]) -> None:
    """What `vllm bench throughput` and `latency` write: a second for each round, half as many for
    a model that is not called "slow".
    """
    given = given_in(words)
    seconds = int(given("seed")) / (1 if Path(given("model")).name == "slow" else 2)
    if mode == "throughput":
        result = {"elapsed_time": seconds, "num_requests": int(given("num-prompts"))}
    else:
        result = {"latencies": [seconds] * int(given("num-iters")), "percentiles": {"50": seconds}}
    Path(given("output-json")).write_text(json.dumps(result))


def guidellm(words: list[str]) -> None:
    """What `guidellm run` 0.8 writes, as far as it is read."""
    backend, output, tokenizer = (
        json.loads(words[words.index(f"--{name}") + 1])
        for name in ("backend", "output", "tokenizer")
    )
    assert Path(tokenizer["model"]).is_dir()
    wanted = dict(part.split("=") for word in words for part in word.split(",") if "=" in part)
    slow = ask(backend["target"], backend["model"])
    speed = 100.0 * int(wanted["streams"]) / (2 if slow else 1)

    def metric(value: float) -> dict[str, Any]:
        found = {"mean": value, "median": value, "percentiles": {"p99": 2 * value}}
        return {"successful": found, "total": None}

    metrics = {
        "request_totals": {"successful": int(wanted["count"])},
        "output_tokens_per_second": metric(speed),
        "output_token_count": metric(float(wanted["output_tokens"])),
        "time_to_first_token_ms": metric(5.0),
        "inter_token_latency_ms": metric(1000 / speed),
        "request_latency": metric(64 / speed),
        "slo_attainment": None,
    }
    report = {"benchmarks": [{"duration": 1.0, "metrics": metrics}]}
    Path(output["path"]).write_text(json.dumps(report))


def given_in(words: list[str]) -> Callable[[str], str]:
    return lambda name: words[words.index(f"--{name}") + 1]


def main() -> None:
    words = sys.argv
    if words[1:3] == ["bench", "serve"]:
        bench(words)
        return
    if words[1] == "bench":
        bench_offline(words[2], words)
        return
    if words[1] == "run":
        guidellm(words)
        return
    fault = words[words.index("--fault") + 1] if "--fault" in words else ""
    if Path(words[2]).name == "slow":
        fault = "unequal"
    serve(Model(fault), int(words[words.index("--port") + 1]))
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if fault == "orphan":
        subprocess.Popen(["sleep", "600"])
    ended.wait()
    print("stopped")
    sys.stdout.flush()
    os._exit(1 if fault == "code" else 0)


if __name__ == "__main__":
    main()
