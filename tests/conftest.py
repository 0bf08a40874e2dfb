import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct in bf16; built once (about a minute) and then reused."""
    directory = ROOT / "demo-output" / "SmolLM2-135M-Instruct"
    command = [sys.executable, str(ROOT / "deploy" / "smollm2.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"cannot build the real model: {done.stderr.strip()[-2000:]}")
    return directory
