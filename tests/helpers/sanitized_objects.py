"""Compiled units of test programs, with sanitizers; objects are kept in build/objects.

The kernels are templates that inline into large functions. Three choices keep GCC's time at about
twice that of the product; each costs no fault that is not found in another way:

- AddressSanitizer checks by calls. Its checks in place take GCC several times as long.
- Debug information is lines only (`-g1`): locations of variables take a quarter of the time.
- UBSan leaves out what AddressSanitizer finds as well: null pointers, and objects' sizes.
"""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from precalib_kernels.toolchain.compile import Unit

OBJECTS = Path(__file__).parents[2] / "build" / "objects"
DEBUG = ("-O1", "-g1", "-fno-omit-frame-pointer")
ADDRESS = ("-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0")
UNDEFINED = (
    "-fsanitize=undefined,float-cast-overflow",
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=all",
)
THREAD = ("-fsanitize=thread",)


def compile_units(compiler: str, units: Sequence[Unit], folder: Path = OBJECTS) -> list[Path]:
    """Objects of the units, in their order; those that are there already are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda unit: _compile(compiler, unit, folder), units))


def link_library(compiler: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """The shared library of these objects, beside them."""
    names = "\0".join([compiler, *flags, *(made.name for made in objects)])
    made = objects[0].with_name(f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.so")
    if not made.exists():
        begun = made.with_suffix(f".{os.getpid()}")
        _run([compiler, "-shared", *objects, *flags, "-o", begun])
        begun.replace(made)
    return made


def _compile(compiler: str, unit: Unit, folder: Path) -> Path:
    """An object whose name holds a digest of flags and of the text with all that it includes."""
    command = [compiler, *unit.flags]
    text = _run([*command, "-E", unit.source])
    version = _run([compiler, "--version"])
    marks = (version, "\0".join(unit.flags).encode(), text)
    digest = hashlib.sha256(b"\0".join(marks)).hexdigest()[:16]
    made = folder / f"{unit.source.stem}-{digest}.o"
    if not made.exists():
        begun = made.with_suffix(f".{os.getpid()}")
        _run([*command, "-c", unit.source, "-o", begun])
        begun.replace(made)
    return made


def _run(command: Sequence[str | Path]) -> bytes:
    """What a compiler prints. The sanitizer that this process may have loaded is not for it."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
