"""Concurrent calls under ThreadSanitizer: one ISA here, all of them in `make nightly`."""

import pytest
import races

from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain.compile import BuildError

try:
    ISAS, REASON = library.supported_isas()[:1], "this processor lacks AVX2"
except BuildError as error:
    ISAS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ISAS, reason=REASON)]


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """Runs the program, with or without what keeps threads of a call in step."""
    work = tmp_path_factory.mktemp("races")
    chosen = races.isas(ISAS)
    races.write_problems(work / "problems", chosen, ["balanced-4"])

    def run(*flags):
        return races.run(races.build(chosen, work, *flags), work / "problems")

    return run


def test_concurrent_calls_do_not_race(called):
    done = called()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "3 callers, 2 rounds" in done.stdout


def test_a_race_would_be_found(called):
    done = called(races.WITHOUT_BARRIERS)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
