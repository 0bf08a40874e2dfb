"""Coverage-guided fuzzing of the C++ code that computes on tensors: `make fuzz-native`.

    python tests/fuzz/native.py --minutes 20 [--folder build/fuzz-native] [FUZZER OPTIONS]

Compiles `native.cpp` and the sources of the product, by g++ as they are shipped, under
AddressSanitizer and UBSan, and runs them by libFuzzer, whose library comes with clang. No torch is
needed. Every ISA that this machine has is run, AMX by tiles in software.

Covered: products of every kernel, rows by number, the trellis search, error feedback. Not covered:
`torch_binding.cpp`, which needs torch; threads, as one thread runs; the Arm kernels.

The cases found are kept in the folder, so that the next call goes on from them. A case that fails
is left there as `crash-…`; give its path to run it again.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "helpers")]

from sanitized_objects import ADDRESS, DEBUG, UNDEFINED, compile_units  # noqa: E402

from precalib_kernels.backends.x86.library import AMX, AVX2, AVX512_BF16, ISAS, SOURCES  # noqa: E402
from precalib_kernels.toolchain import compile as toolchain  # noqa: E402
from precalib_kernels.toolchain.compile import Unit  # noqa: E402

METHOD = ROOT / "offline_quantize" / "method" / "csrc"
TILES = ROOT / "tests" / "kernels" / "backends" / "x86" / "software_tiles.h"
LIBRARIES = "llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-x86_64.a"
NAMES = [isa.name for isa in ISAS]
FLAGS = (*DEBUG, *ADDRESS, "-fopenmp", "-std=c++20", "-w", "-Wno-psabi", *AVX2.flags)
COVERAGE = ("-fsanitize-coverage=trace-pc",)


def main() -> None:
    """Compile what changed and fuzz until the time is up."""
    given, fuzzer_options = options()
    given.folder.mkdir(parents=True, exist_ok=True)
    program = build(given.folder, given.isas)
    cases = given.folder / "cases"
    cases.mkdir(exist_ok=True)
    command = [program, f"-artifact_prefix={given.folder}/", "-print_final_stats=1"]
    limits = ["-timeout=60", "-rss_limit_mb=4096", f"-max_total_time={round(60 * given.minutes)}"]
    again = [word for word in fuzzer_options if not word.startswith("-")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    words = again or [f"-max_len={given.max_len}", "-use_value_profile=1", cases]
    rest = [word for word in fuzzer_options if word.startswith("-")]
    done = subprocess.run(list(map(str, [*command, *limits, *rest, *words])), env=environment)
    sys.exit(done.returncode)


def options() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it libFuzzer gets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz-native")
    parser.add_argument("--max-len", type=int, default=2000, help="bytes of a case")
    parser.add_argument("--isas", nargs="+", choices=NAMES, default=NAMES, help="all by default")
    return parser.parse_known_args()


def build(folder: Path, isas: Sequence[str]) -> Path:
    """The program."""
    libraries = sorted(Path("/usr/lib").glob(LIBRARIES))
    if not libraries:
        sys.exit("fuzz-native: install libFuzzer: apt-get install libclang-rt-14-dev")
    objects = compile_units("g++", list(units(isas)))
    program = folder / "native"
    # Some versions of libFuzzer have a function of their own that counts basic blocks.
    link = ["-Wl,--allow-multiple-definition", *objects, libraries[-1], "-o", program]
    subprocess.run(["g++", "-fopenmp", *ADDRESS, *UNDEFINED, *link], check=True)
    return program


def units(isas: Sequence[str]) -> Iterator[Unit]:
    """The harness, the kernels of these ISAs, and the method."""
    yield Unit(Path(__file__).with_suffix(".cpp"), FLAGS)
    tiles = ("-DPRECALIB_SOFTWARE_TILES", "-include", str(TILES))
    kernels = (*FLAGS, *UNDEFINED, *COVERAGE)
    for name in ("isa_dispatch", "gather_rows"):
        yield Unit(SOURCES / f"{name}.cpp", (*kernels, *tiles[:1]))
    for isa in ISAS:
        own = (*AVX512_BF16.flags, *tiles) if isa is AMX else isa.flags
        if isa.name in isas:
            flags = (*kernels, *own, f"-DPRECALIB_ISA={isa.name}")
            yield Unit(SOURCES / "linear.cpp", flags)
    method = (flag for flag in toolchain.FLAGS if flag.startswith(("-m", "-ff")))
    compared = "-fsanitize-coverage=trace-cmp"
    flags = (*FLAGS, *method, *UNDEFINED, *COVERAGE, compared)
    for name in ("viterbi", "feedback"):
        yield Unit(METHOD / f"{name}.cpp", flags)


if __name__ == "__main__":
    main()
