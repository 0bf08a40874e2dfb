"""A few of the kills that `make kill` does at length."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_are_resumed_to_the_same_bytes(tmp_path):
    script = Path(__file__).with_name("kill.py")
    options = ["--kills", "2", "--ways", "self", "feedback", "resume"]
    command = [sys.executable, script, *options, "--state", tmp_path / "state.json"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" processes killed before their end in ") == 3
