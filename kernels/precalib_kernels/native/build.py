"""Compile the C++ sources of this package into shared libraries, once per machine.

A library's name holds a digest of sources, flags, compiler and processor, so a changed source or
another machine sharing the cache never meets a wrong build.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# No contraction: a fused multiply-add would round differently from the torch reference.
FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS = ("-mprefer-vector-width=512", *FLAGS)  # else compilers stop at half of AVX-512


class BuildError(Exception):
    """The library cannot be built here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A source file and the flags it is compiled with; one file may be several units."""

    source: Path
    flags: tuple[str, ...]


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of native/<name>.cpp, compiled if it is not cached.

    Raises BuildError when there is no compiler or it fails.
    """
    return load_units(name, [Unit(Path(__file__).with_name(f"{name}.cpp"), FLAGS)])


def load_units(name: str, units: Sequence[Unit], link: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made of `units`, compiled if it is not cached.

    link: flags of the last step.

    Raises BuildError when there is no compiler, it fails, or the result cannot be loaded.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++ or clang++) on the PATH")
    library = cache_directory() / f"{name}-{_digest(compiler, units, link)}.so"
    if not library.exists():
        _compile(compiler, units, link, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded ({error})") from error


def cache_directory() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/precalib, by default ~/.cache/precalib."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "precalib"


def _compile(compiler: str, units: Sequence[Unit], link: Sequence[str], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=library.parent) as work,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            objects = [Path(work) / f"{i}.o" for i in range(len(units))]
            commands = [
                [compiler, *unit.flags, "-c", str(unit.source), "-o", str(made)]
                for unit, made in zip(units, objects, strict=True)
            ]
            list(pool.map(_run, commands))
            built = Path(work) / library.name
            _run([compiler, "-shared", *map(str, objects), *link, "-o", str(built)])
            built.replace(library)  # another process may have been faster, with the same bytes
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written ({error.strerror})") from error


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        what = next((Path(part).name for part in command if part.endswith(".cpp")), "linking")
        raise BuildError(f"{command[0]} failed on {what}: {lines[0]}") from error


def _digest(compiler: str, units: Sequence[Unit], link: Sequence[str]) -> str:
    """Of everything a library depends on; headers beside a source count as its text."""
    marks = [_processor(), _version(compiler), " ".join(link).encode()]
    for unit in units:
        texts = (unit.source, *sorted(unit.source.parent.glob("*.h")))
        marks += [" ".join(unit.flags).encode(), *(text.read_bytes() for text in texts)]
    return hashlib.sha256(b"\0".join(marks)).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> bytes:
    done = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    return done.stdout


@functools.cache
def _processor() -> bytes:
    """What -march=native depends on: model and features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    seen = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(seen.get(key, "") for key in wanted).encode()
