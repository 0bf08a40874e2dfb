import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The scripts of deploy/ are not part of the distribution.
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "deploy"))


@pytest.fixture(scope="session")
def tool():
    """Runs a program of this environment in the project's folder; its output, if it succeeds."""

    def run(name, *words, **variables):
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        program = shutil.which(name, path=places)
        assert program, f"{name} is not installed; run: make install"
        done = subprocess.run(
            [program, *map(str, words)],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run
