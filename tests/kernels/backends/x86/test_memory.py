"""Stack and heap of a call, held to the bounds in docs/cpu-kernels.md."""

import subprocess
from pathlib import Path

import pytest
from stack_frames import Library, UnboundedError

from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain.compile import BuildError, find_compiler

try:
    ISAS, REASON = library.supported_isas(), "this processor lacks AVX2"
except BuildError as error:
    ISAS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ISAS, reason=REASON)]

HELPERS = Path(__file__).parents[3] / "helpers"
CALLER, WORKER = 24 << 10, 16 << 10  # bytes of stack
DISPATCH = r"^_ZN8precalib6linearE"
OF_AN_ISA = r"^_ZN8precalib\d+\w+6linearERK"
PARALLEL = r"_omp_fn"
OPERATORS = r"cpu_linearEP\w+$", r"cpu_gather_rowsEP\w+$"


@pytest.fixture(scope="module")
def compiled():
    return Library(Path(library.load()._name))


def test_the_stack_of_a_call_is_bounded(compiled):
    """Calls by pointer are added up: operator, dispatch, an ISA's driver, its parallel region."""
    parts = [OPERATORS[0], OF_AN_ISA, PARALLEL]
    depths = [max(map(compiled.depth, compiled.named(part))) for part in parts]
    assert len(compiled.named(OF_AN_ISA)) >= len(ISAS)
    assert len(compiled.named(PARALLEL)) > 100
    assert sum(depths) <= CALLER
    assert depths[-1] <= WORKER
    (gather,) = compiled.named(OPERATORS[1])
    assert compiled.depth(gather) + depths[-1] <= CALLER
    assert sum(depths) > 4096  # which one frame of a GEMV alone takes


SOURCE = """
#include <alloca.h>
#include <cstring>
void use(char*);
extern "C" void small() { char room[100]; use(room); }
extern "C" void large() { char room[5000]; use(room); small(); use(room); }
extern "C" [[gnu::visibility("hidden")]] int circle(int n, char* room) {
  use(room);
  return n ? circle(n - 1, room + n) + 1 : 0;
}
extern "C" int start(char* room) { return circle(9, room); }
"""
GROWING = 'extern "C" void growing(int n) { use((char*)alloca(n)); }\n'


def compile_source(folder, text):
    (folder / "source.cpp").write_text(text)
    made = folder / "made.so"
    command = [find_compiler(), "-O1", "-shared", "-fPIC", folder / "source.cpp", "-o", made]
    subprocess.run(command, check=True)
    return made


def test_frames_are_read_off_machine_code(tmp_path):
    made = Library(compile_source(tmp_path, SOURCE))
    small, large, circle = (made.named(f"^{name}$")[0] for name in ("small", "large", "circle"))
    assert 100 < small.frame < 250
    assert 5000 < large.frame < 5250
    with pytest.raises(UnboundedError, match="circle calls itself"):
        made.depth(circle)
    assert made.depth(large) > large.frame
    with pytest.raises(UnboundedError, match="growing has a frame that grows with data"):
        Library(compile_source(tmp_path, SOURCE + GROWING))


def test_the_heap_of_a_call_is_bounded(run_suite, tmp_path):
    counter = tmp_path / "counted_heap.so"
    command = [find_compiler(), "-O1", "-std=c++20", "-shared", "-fPIC"]
    subprocess.run([*command, HELPERS / "counted_heap.cpp", "-o", counter], check=True)
    run_suite(["-m", "pytest", Path(__file__).with_name("heap_suite.py")], LD_PRELOAD=str(counter))
