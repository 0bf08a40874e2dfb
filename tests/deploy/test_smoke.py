import os
import subprocess
import sys
from pathlib import Path

import fake_vllm
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = Path(sys.executable).parent
FAKE = Path(fake_vllm.__file__)


def smoke(model: Path, vllm: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    variables = {"VLLM": str(vllm), "PYTHON": sys.executable, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [ROOT / "deploy" / "smoke.sh", model, "--enforce-eager", "--max-model-len", "512"]
    return subprocess.run(
        [*command, *flags], env=os.environ | variables, capture_output=True, text=True
    )


@pytest.mark.engine
def test_quantized_model_is_served(smollm2, tmp_path):
    target = tmp_path / "packed"
    subprocess.run([COMMANDS / "precalib", "quantize", smollm2, target], check=True)
    done = smoke(target, COMMANDS / "vllm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout  # "The capital of France is"
    assert "SIGTERM: 4 requests in flight, ended in " in done.stdout
    assert done.stdout.endswith("smoke: ok\n")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_failure_shows_the_server_log(tmp_path):
    done = smoke(tmp_path, script(tmp_path / "vllm", "echo out of weights; exit 1"))
    assert done.returncode == 1
    assert "ended with exit code 1" in done.stderr
    assert "out of weights" in done.stderr


@pytest.mark.slow
def test_a_failed_check_is_a_failure(tmp_path):
    vllm = script(tmp_path / "vllm", f'exec {sys.executable} {FAKE} "$@"')
    done = smoke(tmp_path, vllm)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("smoke: ok\n")
    done = smoke(tmp_path, vllm, "--fault", "nan")
    assert done.returncode == 1
    assert "smoke: FAILED: " in done.stderr
    assert "had NaN in their logits" in done.stderr
    assert "smoke: ok" not in done.stdout


def test_a_vllm_that_is_not_there_is_named(tmp_path):
    done = smoke(tmp_path, tmp_path / "vllm")
    assert done.returncode == 1
    assert f"smoke: no {tmp_path}/vllm" in done.stderr
