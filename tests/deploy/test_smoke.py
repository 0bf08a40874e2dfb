import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = Path(sys.executable).parent


def smoke(model: Path, vllm: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "smoke.sh", model, "--enforce-eager", "--max-model-len", "256"],
        env=os.environ | {"VLLM": str(vllm), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.engine
def test_quantized_model_is_served(smollm2, tmp_path):
    target = tmp_path / "packed"
    subprocess.run([COMMANDS / "precalib", "quantize", smollm2, target], check=True)
    done = smoke(target, COMMANDS / "vllm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout  # "The capital of France is"
    assert done.stdout.endswith("smoke: ok\n")


def test_failure_shows_the_server_log(tmp_path):
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\necho out of weights; exit 1\n")
    vllm.chmod(0o755)
    done = smoke(tmp_path, vllm)
    assert done.returncode == 1
    assert "smoke: FAILED: the server ended" in done.stderr
    assert "out of weights" in done.stderr
