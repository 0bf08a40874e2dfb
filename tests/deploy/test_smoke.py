import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = Path(sys.executable).parent


def smoke(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "smoke.sh", model, "--enforce-eager", "--max-model-len", "256", *flags],
        env=os.environ | {"VLLM": str(COMMANDS / "vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.engine
def test_quantized_model_is_served(smollm2, tmp_path):
    target = tmp_path / "packed"
    subprocess.run([COMMANDS / "precalib", "quantize", smollm2, target], check=True)
    done = smoke(target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout  # "The capital of France is"
    assert done.stdout.endswith("smoke: ok\n")


@pytest.mark.engine
def test_failure_shows_the_server_log(tmp_path):
    done = smoke(tmp_path / "missing")
    assert done.returncode == 1
    assert "smoke: FAILED: the server ended" in done.stderr
    assert "missing" in done.stderr
