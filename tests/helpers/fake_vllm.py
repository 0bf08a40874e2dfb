"""Stands in for `vllm serve`: OpenAI's routes and metrics, right or with one fault.

    python fake_vllm.py serve MODEL --port N [--fault NAME]

Faults are those that `tests/deploy/test_checks.py` lists.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT = [" Paris", ".", " It", " is"]


class Model:
    """Counts as vLLM does, and misbehaves as told."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.requests = 0
        self.nan = 1 if fault == "nan" else 0

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
        missing = {"no metric": "e2e_request", "no canary": "corrupted"}.get(self.fault, "\0")
        return "\n".join(line for line in lines if missing not in line) + "\n"


def handler(model: Model) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send(self, data: str | dict[str, Any], status: int = 200) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text is data else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.send({"object": "list", "data": [{"id": "m", "max_model_len": 4096}]})
            else:
                self.send(model.metrics() if self.path == "/metrics" else "")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = "messages" in asked
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
            for piece in pieces:
                part = {"delta": {"content": piece}} if chat else {"text": piece}
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


def main() -> None:
    words = sys.argv
    fault = words[words.index("--fault") + 1] if "--fault" in words else ""
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
