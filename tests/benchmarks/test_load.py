"""The load of `benchmarks/load.py` on a stand-in of vLLM: what it counts and finds wrong."""

import json
import os
import sys

import fake_vllm
import pytest

from offline_quantize import quantize_checkpoint

SECONDS = float(os.environ.get("PRECALIB_LOAD_SECONDS", "120"))
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def script(load):
    return load("load")


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("VLLM", str(program))
    return tmp_path


def run(script, folder, *options, monkeypatch):
    words = ["load.py", str(folder / "model"), "--minutes", "0.05", "--clients", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(folder), *options])
    script.main()


@pytest.mark.slow
def test_a_server_without_fault_passes(script, vllm, monkeypatch):
    run(script, vllm, monkeypatch=monkeypatch)
    found = json.loads((vllm / "load.json").read_text())["models"]["model"]
    assert found["faults"] == []
    assert min(found["requests"].values()) > 0
    assert found["read"] <= found["ended"] <= found["valid"]
    assert sum(found["answered"].values()) == sum(found["requests"].values())
    assert found["memory_last_mb"] > 1
    page = (vllm / "load.md").read_text()
    assert f"| malformed requests | {found['requests']['malformed']:,} |" in page
    assert "| faults | none |" in page


@pytest.mark.slow
def test_errors_that_are_not_the_clients_are_faults(script, vllm, monkeypatch):
    with pytest.raises(SystemExit, match="1"):
        run(script, vllm, "--serve-flags=--fault rude", monkeypatch=monkeypatch)
    faults = json.loads((vllm / "load.json").read_text())["models"]["model"]["faults"]
    assert any(text.startswith("malformed: ") for text in faults)
    assert any(text.startswith("oversized: ") for text in faults)
    assert all("status 500" in text or "the server {'2xx'" in text for text in faults)


@pytest.mark.slow
@pytest.mark.engine
def test_a_served_model_bears_the_load(script, byte_llama, tmp_path, monkeypatch):
    """Two minutes of what `make load` does for ten, on a tiny packed model."""
    source, packed = byte_llama(hidden_size=128, intermediate_size=256), tmp_path / "packed"
    (source / "chat_template.jinja").write_text(CHAT)
    quantize_checkpoint(source, packed, "balanced-4", activations="none", jobs=1)
    for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")):
        monkeypatch.setenv(name, value)
    words = [str(packed), "--minutes", str(SECONDS / 60), "--out", str(tmp_path)]
    flags = "--serve-flags=--enforce-eager --max-model-len 512"
    monkeypatch.setattr(sys, "argv", ["load.py", *words, flags])
    script.main()  # which ends with exit code 1 if there was a fault
    found = json.loads((tmp_path / "load.json").read_text())["models"]["packed"]
    assert found["faults"] == []
    assert min(found["requests"].values()) > 0
    assert found["tokens"] > found["read"]


def tallies(script, **fine):
    found = {kind: script.Tally() for kind in script.SHARES}
    for kind, number in fine.items():
        found[kind].fine = number
    return found


FLAT = ((0, 100), (5, 100), (9, 100))


def judge(script, sent, samples=FLAT, ended=9, running=0, good=11, bad=4):
    counted = {"vllm:num_requests_running": running, "vllm:request_success_total": ended}
    counted |= {"2xx": good, "4xx": bad}
    return script.summary(sent, list(samples), 10.0, counted)["faults"]


def test_what_counts_as_a_fault(script):
    sent = tallies(script, chat=6, slow=3, leaver=2, malformed=4)
    assert judge(script, sent) == []
    assert judge(script, sent, ended=11) == []  # who left may have been answered in full
    assert "but vLLM counted 8" in judge(script, sent, ended=8)[0]
    assert "but vLLM counted 12" in judge(script, sent, ended=12)[0]
    assert judge(script, sent, running=2) == ["2 requests were still at work 120 s after the last"]
    (fault,) = judge(script, sent, good=10)
    assert fault == (
        "clients count the answers {'2xx': 11, '4xx': 4}, but the server {'2xx': 10, '4xx': 4}"
    )
    assert "'4xx': 5" in judge(script, sent, bad=5)[0]
    growing = ((0, 1), (5, 100), (9, 103))
    (fault,) = judge(script, sent, growing)
    assert fault == "memory grew by 3.0% from the second to the last third"
    assert judge(script, sent, ((0, 1), (5, 100), (9, 101))) == []
    sent["chat"].faults["a stream that was cut"] = 1
    assert judge(script, sent, good=12) == ["chat: 1 times a stream that was cut"]


def test_memory_is_told_by_the_minute(script):
    assert script.by_minute([(0, 2_000_000), (59, 4_000_000), (61, 1_000_000)]) == [3.0, 1.0]


@pytest.mark.slow
def test_clients_pause_when_told_to(script, vllm, monkeypatch):
    run(script, vllm, "--pause", "60", monkeypatch=monkeypatch)
    found = json.loads((vllm / "load.json").read_text())["models"]["model"]
    assert sum(found["requests"].values()) <= 2 * 8  # of eight clients, within three seconds
    assert "each with 60 s on average between two requests" in (vllm / "load.md").read_text()
