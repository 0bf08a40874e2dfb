import contextlib
import json
import re
import subprocess
from types import SimpleNamespace

import demo
import psutil
import pytest
import torch
from safetensors.torch import save_file


def test_linear_bytes_counts_what_replaces_a_weight(tmp_path):
    tensors = {
        "a.q_proj.qweight": torch.zeros(4, 16, dtype=torch.uint8),
        "a.q_proj.scales": torch.zeros(4, 1, dtype=torch.float16),
        "a.q_proj.bias": torch.zeros(4),
        "lm_head.weight": torch.zeros(4, 32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert demo.linear_bytes(tmp_path, {"a.q_proj": "4-bit"}) == 4 * 16 + 4 * 2


@pytest.mark.parametrize(
    ("computed_by", "isas", "text"),
    [
        ({"dense"}, [], "weights are unpacked to bf16 once"),
        ({"x86"}, ["amx"], "x86 with amx: products read a quarter of the bytes. Attention"),
        ({"x86"}, ["avx2"], "x86 with avx2: .* product that this processor has to emulate. Atten"),
        ({"triton", "reference"}, [], "The backend here is reference, triton."),
    ],
)
def test_the_result_is_explained(computed_by, isas, text):
    assert re.search(text, demo.explanation(computed_by, isas))


def test_rounds_end_when_the_time_is_up(monkeypatch):
    clock = iter([0, 60, 120])  # when it begins, and before the second and the third round
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(demo, "bench_once", lambda server: float(server))
    monkeypatch.setattr(demo, "working", lambda _: contextlib.nullcontext())
    assert demo.bench({"a": 1, "b": 2}) == {"a": [1, 1], "b": [2, 2]}


def test_memory_is_that_of_all_processes():
    child = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    try:
        family = SimpleNamespace(process=child, family=psutil.Process(child.pid).children())
        alone = SimpleNamespace(process=child, family=[])
        assert 0 < demo.memory(alone) < 50e6
        assert demo.memory(family) >= demo.memory(alone)
    finally:
        child.kill()


def test_backends_are_read_from_the_file_of_choices(tmp_path):
    choices = tmp_path / "backends.jsonl"
    names = ("dense", "reference", "dense")
    choices.write_text("".join(json.dumps({"backend": name}) + "\n" for name in names))
    assert demo.backends(choices) == {"dense", "reference"}
