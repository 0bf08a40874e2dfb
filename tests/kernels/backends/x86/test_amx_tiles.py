"""ISA `amx` on machines without AMX: the tests of `test_op.py`, with tiles in software."""

from pathlib import Path

import pytest

from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain.compile import BuildError

try:
    HIGHEST, REASON = library.supported_isas()[-1:], "this processor has AMX, or lacks AVX512-BF16"
except BuildError as error:
    HIGHEST, REASON = (), f"the kernels cannot be built here: {error}"


@pytest.mark.slow
@pytest.mark.skipif(HIGHEST != ("avx512_bf16",), reason=REASON)
def test_what_isa_amx_computes(run_suite):
    script = Path(__file__).with_name("rebuilt_suite.py")
    run_suite([script, "--software-tiles", "-k", "amx"])
