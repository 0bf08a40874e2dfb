import json
import re
import subprocess
from types import SimpleNamespace

import demo
import psutil
import pytest
import torch
from safetensors.torch import save_file

from offline_quantize.benchmark import rounds as rounds_of_bench
from offline_quantize.benchmark.cases import Case, Measurement
from offline_quantize.benchmark.results import Results


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


@pytest.mark.parametrize(("seconds", "rounds"), [(10, 3), (25, 2), (200, 1)])
def test_the_servers_are_measured_by_the_bench(monkeypatch, tmp_path, capsys, seconds, rounds):
    clock = [0.0]
    monkeypatch.setattr(rounds_of_bench.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(demo, "BENCH", tmp_path / "bench")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "measurements.jsonl").write_text("of an earlier run")

    def measure(label, address, model, tokenizer, case, number):
        clock[0] += seconds
        assert (address, model, tokenizer, case) == (
            f"at {label}",
            "m",
            demo.TARGET,
            Case("brief", 4),
        )
        return Measurement(
            server=label,
            prompts=case.prompts,
            concurrency=case.concurrency,
            round=number,
            seconds=1.0,
            tokens_per_second=100.0 if label == "bf16" else 150.0,
            answer_tokens=32.0,
            first_token_ms=1000.0,
            token_ms=12.34,
        )

    monkeypatch.setattr(demo, "measure", measure)
    servers = {name: SimpleNamespace(url=f"at {name}", name="m") for name in ("bf16", "precalib")}
    plain, packed = demo.bench(servers)
    assert (plain.rounds, packed.rounds) == (rounds, rounds)
    assert packed.ratio.mean == pytest.approx(1.5)
    written = Results.model_validate_json((tmp_path / "bench" / "bench.json").read_text())
    assert written.rows == [plain, packed]
    assert "1 of 2: round 1, brief prompts, 4 at once, precalib" in capsys.readouterr().out


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
