"""The scripts that need a GPU, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = {"bench": [], "acceptance": ["--out", "never-made"]}
FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


@pytest.mark.parametrize("script", ["bench", "acceptance"])
def test_scripts_say_when_there_is_no_gpu(script):
    command = [sys.executable, str(FOLDER / f"{script}.py"), *OPTIONS[script]]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert "this machine has no GPU" in done.stderr
