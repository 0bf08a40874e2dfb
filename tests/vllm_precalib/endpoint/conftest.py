"""vLLM's application with stand-ins of its OpenAI routes, its real authentication, the plugin."""

import argparse
import asyncio
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from offline_quantize.api import quantize_checkpoint
from vllm_precalib.endpoint import PrecalibEndpoint, served_model

KEY = "a key of this test"
SERIOUS = ("serious", "critical")
WORDS = [" Paris", " is", " <b>", " it"]


def listed(index):
    """Log probabilities of token ids at a position, a distribution with a tail."""
    return {100 + index: math.log(0.5), 7: math.log(0.25), 8: math.log(0.125)}


def scored(ids, shift=0.0):
    """What `prompt_logprobs` returns: the token itself and others."""
    result = [None]
    for index, token in enumerate(ids[1:], 1):
        values = {token: math.log(0.5 - shift), 7: math.log(0.25 + shift), 900 + index: -9.0}
        result.append({str(i): {"logprob": v, "decoded_token": f"t{i}"} for i, v in values.items()})
    return {"choices": [{"index": 0, "prompt_logprobs": result}]}


@pytest.fixture(scope="module")
def serious_faults():
    """Finds what axe-core calls serious or critical in a page."""
    from axe_playwright_python.sync_playwright import Axe

    def find(page):
        violations = Axe().run(page).response["violations"]
        return [(v["impact"], v["id"]) for v in violations if v["impact"] in SERIOUS]

    return find


@pytest.fixture
def assert_sound(serious_faults):
    """Of an opened page at an address: it fits its window, asks nobody else, has no fault."""

    def check(found, address):
        across, inside = found.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert across <= inside
        assert found.said == []
        own = {url for url in found.asked if not url.startswith("data:")}
        assert all(url.startswith(f"{address}/precalib") for url in own)
        assert serious_faults(found.page) == []

    return check


class Standin:
    """vLLM's routes: what they were asked, and how they answer."""

    def __init__(self):
        self.asked = []
        self.ended = threading.Event()
        self.endless = False

    def attach(self, app):
        @app.post("/v1/completions")
        async def completions(request: Request):
            return await self.answer(request, chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            return await self.answer(request, chat=True)

    async def answer(self, request, chat):
        asked = await request.json()
        self.asked.append((asked, request.headers.get("authorization")))
        if "prompt_logprobs" in asked:
            return JSONResponse(scored(asked["prompt"]))
        if asked["max_tokens"] > 900:
            error = {"message": "too many tokens", "type": "BadRequestError"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self.stream(chat), media_type="text/event-stream")

    async def stream(self, chat):
        try:
            for index, word in enumerate(WORDS * (10_000 if self.endless else 1)):
                yield f"data: {json.dumps(self.chunk(index, word, chat))}\n\n"
                await asyncio.sleep(0.01 if self.endless else 0)
            yield "data: [DONE]\n\n"
        finally:
            self.ended.set()

    def chunk(self, index, word, chat):
        choice = {"index": 0, "token_ids": [100 + index]}
        top = [(word, math.log(0.75)), (" no", math.log(0.125))]
        if chat:
            others = [{"token": token, "logprob": value} for token, value in top]
            entry = {"token": word, "logprob": top[0][1], "top_logprobs": others}
            choice |= {"delta": {"content": word}, "logprobs": {"content": [entry]}}
            return {"choices": [choice], "prompt_token_ids": [1, 2, 3] if not index else None}
        logprobs = {"tokens": [word], "token_logprobs": [top[0][1]], "top_logprobs": [dict(top)]}
        choice |= {"text": word, "logprobs": logprobs}
        if not index:
            choice["prompt_token_ids"] = [1, 2, 3]
        return {"choices": [choice]}


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A real packed checkpoint of two layers, one of whose tensors has a hostile name."""
    folder = tmp_path_factory.mktemp("packed")
    source = folder / "source"
    source.mkdir()
    names = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("up", "down")]
    tensors = {name: torch.randn(128, 128).bfloat16() for name in names}
    tensors["model.layers.1.<img src=x onerror=alert(1)>.weight"] = torch.randn(128, 128).bfloat16()
    tensors["model.norm.weight"] = torch.ones(128).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    quantize_checkpoint(source, folder / "packed", "rtn-4", activations="none", jobs=1)
    return folder / "packed"


@pytest.fixture
def registry(monkeypatch):
    """Metrics of this test alone."""
    found = CollectorRegistry()
    monkeypatch.setattr("vllm.v1.metrics.prometheus.get_prometheus_registry", lambda: found)
    monkeypatch.setattr("prometheus_client.REGISTRY", found)
    return found


@pytest.fixture
def build(packed, registry, monkeypatch):
    """The application as vLLM builds it, and what stands in for its routes."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    from vllm.plugins.endpoint_plugins.interface import (
        attach_endpoint_plugins,
        init_endpoint_plugins_state,
    )

    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [PrecalibEndpoint()])

    def make(keys=(), model=packed, engine=None, ready=True, **ours):
        app, standin = FastAPI(), Standin()
        engine = engine or SimpleNamespace(errored=False)
        engine.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(model=str(model)), instance_id="2"
        )
        standin.attach(app)
        attach_endpoint_plugins(app, ("generate",))
        init_exception_handler(app)
        if keys:
            app.add_middleware(AuthenticationMiddleware, tokens=list(keys))
        args = argparse.Namespace(
            model=str(model),
            served_model_name=["served"],
            api_key=list(keys) or None,
            additional_config={"precalib": ours} if ours else {},
        )
        args.log_error_stack = False
        app.state.args = args
        if ready:
            # in a thread of its own, as a browser's test already runs a loop in this one
            with ThreadPoolExecutor(1) as pool:
                started = init_endpoint_plugins_state(engine, app.state, args)
                pool.submit(asyncio.run, started).result()
        return SimpleNamespace(app=app, standin=standin, client=TestClient(app))

    return make


@pytest.fixture
def choice(packed):
    """A line of a `choices_file`, if not said otherwise of the packed model and the run "2"."""

    def make(layer, backend="x86", rank=0, **more):
        fields = {"layer": layer, "layout_name": "rtn-4", "rank": rank, "backend": backend}
        fields |= {"asked_for": False, "reasons": {"x86": "no"}, "spec": {}}
        return json.dumps(fields | {"model": str(packed), "run": "2"} | more)

    return make


@pytest.fixture
def other_server():
    """Another vLLM, as far as the comparison uses it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send({"data": [{"id": "original"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body, self.headers.get("Authorization")))
            self.send(scored(body["prompt"], shift=0.125))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


@pytest.fixture
def model_of():
    """The `ServedModel` of an application."""
    return lambda app: served_model.served(app.state)
