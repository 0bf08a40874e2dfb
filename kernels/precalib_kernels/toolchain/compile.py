"""The package's C++ sources as shared libraries: compiled at installation, else at first use.

A library's name holds a digest of sources, flags and machine, so neither a changed source nor
another machine sharing the cache meets a wrong build. The compiler is no part of it: what is built
is found again without one. The build imports this module, so it needs the standard library only.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMPILED = Path(__file__).with_name("compiled")  # of a wheel; no such folder in the sources
COMPILERS = ("g++", "clang++", "c++")
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


@dataclasses.dataclass(frozen=True)
class Library:
    """What a library is made of; `link` are the flags of the last step."""

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...] = ()

    def file_name(self) -> str:
        """Name with a digest; headers beside a source count as its text."""
        marks = [" ".join(self.link).encode()]
        for unit in self.units:
            texts = (unit.source, *sorted(unit.source.parent.glob("*.h")))
            marks += [_machine(unit.flags), " ".join(unit.flags).encode()]
            marks += [text.read_bytes() for text in texts]
        digest = hashlib.sha256(b"\0".join(marks)).hexdigest()[:16]
        return f"{self.name}-{digest}.so"


def definition(source: Path) -> Library:
    """The library of one source file, named after it."""
    return Library(source.stem, (Unit(source, FLAGS),))


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The library of one source file. Raises BuildError as `load_library` does."""
    return load_library(definition(source))


def load_library(library: Library) -> ctypes.CDLL:
    """The library as installation or an earlier use left it, else compiled now.

    One that cannot be loaded, such as a newer system's in a shared home, is compiled again.

    Raises BuildError when there is no compiler, it fails, or the result cannot be loaded.
    """
    kept = cache_directory() / library.file_name()
    failures: list[str] = []
    for path in (COMPILED / kept.name, kept):
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            if path.exists():
                failures.append(f"cannot load {error}")
    try:
        compile_library(library, kept)
        return ctypes.CDLL(str(kept))
    except BuildError as error:
        raise BuildError("; ".join([*failures, str(error)])) from error
    except OSError as error:
        raise BuildError(f"cannot load {error}") from error


def cache_directory() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/precalib, by default ~/.cache/precalib."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "precalib"


def find_compiler() -> str | None:
    """The C++ compiler: $CXX where it names an executable, else the first of COMPILERS there is."""
    found = map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))
    return next(filter(None, found), None)


def compile_library(library: Library, path: Path) -> None:
    """Write the library to `path`, whole or not at all.

    Raises BuildError when there is no compiler, it fails, or the directory cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler ($CXX, {', '.join(COMPILERS)}) on the PATH")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as work,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            objects = [Path(work) / f"{i}.o" for i in range(len(library.units))]
            commands = [
                [compiler, *unit.flags, "-c", str(unit.source), "-o", str(made)]
                for unit, made in zip(library.units, objects, strict=True)
            ]
            list(pool.map(_run, commands))
            built = Path(work) / path.name
            _run([compiler, "-shared", *map(str, objects), *library.link, "-o", str(built)])
            built.replace(path)  # another process may have been faster, with the same library
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error.strerror})") from error


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        what = next((Path(part).name for part in command if part.endswith(".cpp")), "linking")
        raise BuildError(f"{command[0]} failed on {what}: {lines[0]}") from error


def _machine(flags: tuple[str, ...]) -> bytes:
    return _processor() if "-march=native" in flags else platform.machine().encode()


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
