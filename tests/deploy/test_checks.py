"""Each check of a running server passes on a right one, and fails on one with its fault."""

import sys
import types
from pathlib import Path

import checks
import fake_vllm
import pytest
from checks import CheckError

from offline_quantize.benchmark import server as servers
from offline_quantize.benchmark.server import Server

FAKE = Path(fake_vllm.__file__)


@pytest.fixture
def served():
    """Starts the stand-in in this process, with a fault or without."""
    running = []

    def start(fault=""):
        running.append(fake_vllm.serve(fake_vllm.Model(fault)))
        url = f"http://127.0.0.1:{running[-1].server_port}"
        return types.SimpleNamespace(url=url, name="m")

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask_all(server):
    before = checks.metrics(server)
    text = checks.equal_completions(server)
    pieces = checks.streamed_completion(server, text)
    shown = []
    answer = checks.chat(server, shown.append)
    after = checks.metrics(server)
    summary = checks.check_metrics(before, after)
    checks.check_canary(after)
    return text, pieces, answer, shown, summary


def test_a_server_without_fault_passes(served, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not matter
    text, pieces, answer, shown, summary = ask_all(served())
    assert (text, pieces) == (" Paris. It is", 4)
    assert answer == text
    assert shown == fake_vllm.TEXT
    assert summary == "prompt_tokens_total +4, generation_tokens_total +4, request_success_total +4"


def test_a_model_without_a_chat_template_has_no_chat(served):
    assert ask_all(served("no template"))[2] is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty", "the completion is empty"),
        ("unequal", "two greedy completions differ: ' Paris. It is1' and ' Paris. It is2'"),
        ("lump", "came in one piece"),
        ("other", r"streamed, the completion is ' Paris\. It is\?' and not ' Paris\. It is'"),
        ("mute", "the answer of the chat is empty"),
        ("no metric", "the metric vllm:e2e_request_latency_seconds_count is missing"),
        ("still", "the metric vllm:prompt_tokens_total did not move: it is still 0"),
        ("no canary", "vllm:corrupted_requests_total is missing, so NaN would go unseen"),
        ("nan", "2 requests had NaN in their logits"),
    ],
)
def test_a_fault_is_found(served, fault, message):
    with pytest.raises(CheckError, match=message):
        ask_all(served(fault))


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Starts the stand-in as a process; each is stopped."""
    vllm = tmp_path / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    vllm.chmod(0o755)
    monkeypatch.setenv("VLLM", str(vllm))
    monkeypatch.setattr(servers, "STOP_SECONDS", 3)
    monkeypatch.setattr(checks, "STOP_SECONDS", 3)
    running = []

    def start(*flags):
        running.append(Server("m", tmp_path / "model", tmp_path / "log", *flags))
        running[-1].wait_until_ready(60)
        return running[-1]

    yield start
    for server in running:
        server.stop()


def test_a_clean_stop_with_requests_in_flight(process):
    summary = checks.stop_in_flight(process())
    assert summary.startswith("4 requests in flight, ended in ")
    assert summary.endswith(" with exit code 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("deaf", "ignored SIGTERM for 3 s with requests in flight"),
        ("code", "ended with exit code 1 after SIGTERM"),
        ("orphan", "1 processes of the server outlived it"),
    ],
)
def test_an_unclean_stop_is_found(process, fault, message):
    with pytest.raises(CheckError, match=message):
        checks.stop_in_flight(process("--fault", fault))
