"""ISA `amx` on machines without AMX: the tests of `test_op.py`, with tiles in software."""

import subprocess
import sys
from pathlib import Path

import pytest

from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain.compile import BuildError

try:
    HIGHEST = library.supported_isas()[-1:]
except BuildError:
    HIGHEST = ()


@pytest.mark.skipif(HIGHEST != ("avx512_bf16",), reason="has AMX, or lacks what it is added to")
def test_what_isa_amx_computes():
    script = Path(__file__).with_name("rebuilt.py")
    command = [sys.executable, str(script), "--software-tiles", "-k", "amx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
