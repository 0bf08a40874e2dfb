"""The package's C++ sources as shared libraries: compiled at installation, else at first use.

GCC compiles them: the kernels call the GNU runtime of OpenMP, which is the one that torch loads.
Where a compiler fails the next one is tried, and an optional part that cannot be compiled is left
out; a sentence tells of both.

A library's name holds a digest of sources, flags and machine, so neither a changed source nor
another machine sharing the cache meets a wrong build. The compiler is no part of it: what is built
is found again without one. The build imports this module, so it needs the standard library only.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from precalib_kernels.toolchain.cache import (
    UnsafeCacheError,
    cache_directory,
    keep_private,
    make_private,
    why_unsafe,
)

COMPILED = Path(__file__).with_name("compiled")  # of a wheel; no such folder in the sources
COMPILERS = ("g++", "c++")
WARNINGS = ("-Wall", "-Wextra")
# No contraction: a fused multiply-add would round differently from the torch reference.
FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    *WARNINGS,
)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS = ("-mprefer-vector-width=512", *FLAGS)  # else compilers stop at half of AVX-512


class BuildError(Exception):
    """The library cannot be built here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A source file and the flags it is compiled with; one file may be several units.

    optional: what is lost without the unit, if the library can do without it.
    """

    source: Path
    flags: tuple[str, ...]
    optional: str = ""


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

    One that cannot be loaded, such as a newer system's in a shared home, is compiled again, and so
    is one in the cache that somebody else may have written. Of several processes that need it at
    once, one compiles and the others wait.

    Raises BuildError when there is no compiler, it fails, or the result cannot be loaded.
    """
    kept = cache_directory() / library.file_name()
    known = _inode(kept)
    failures: list[str] = []
    for path in (COMPILED / kept.name, kept):
        if path is kept and (reason := why_unsafe(kept)):
            failures.append(f"{kept} is not loaded, as {reason}")
            warnings.warn(f"{failures[-1]}; it is compiled again", stacklevel=2)
            continue
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            if path.exists():
                failures.append(f"cannot load {error}")
    try:
        with _one_at_a_time(kept):
            by_another = _inode(kept) not in (None, known) and not why_unsafe(kept)
            for remark in () if by_another else compile_library(library, kept):
                warnings.warn(f"{remark}; delete {kept} to have it compiled again", stacklevel=2)
            return ctypes.CDLL(str(kept))
    except BuildError as error:
        raise BuildError("; ".join([*failures, str(error)])) from error
    except OSError as error:
        raise BuildError(f"cannot load {error}") from error


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextlib.contextmanager
def _one_at_a_time(kept: Path) -> Iterator[None]:
    """Wait until no other process of this machine compiles `kept`.

    Where a lock cannot be had, compiling says why, or does the work twice.
    """
    lock = kept.with_suffix(".lock")
    try:
        make_private(lock.parent)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (OSError, UnsafeCacheError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def find_compiler() -> str | None:
    """The C++ compiler that is tried first."""
    return next(iter(find_compilers()), None)


def find_compilers() -> list[str]:
    """$CXX where it names an executable, then those of COMPILERS that there are; each once."""
    found: dict[str, str] = {}
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if path := shutil.which(name):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def compile_library(library: Library, path: Path) -> tuple[str, ...]:
    """Write the library to `path`, whole or not at all.

    returns: a sentence for each optional unit that is left out and each compiler that failed before
             another one did not.

    Raises BuildError when there is no compiler, all fail, or the directory cannot be written.
    """
    compilers = find_compilers()
    if not compilers:
        raise BuildError(f"no C++ compiler ($CXX, {', '.join(COMPILERS)}) on the PATH")
    failures: list[str] = []
    for compiler in compilers:
        try:
            left_out = _compile_by(compiler, library, path)
        except UnsafeCacheError as error:
            raise BuildError(str(error)) from error
        except OSError as error:
            raise BuildError(f"{path.parent} cannot be written ({error.strerror})") from error
        except BuildError as error:
            failures.append(str(error))
        else:
            return (*(f"{failure}; {compiler} is used instead" for failure in failures), *left_out)
    raise BuildError("; ".join(failures))


def _compile_by(compiler: str, library: Library, path: Path) -> list[str]:
    if path.parent == cache_directory():
        make_private(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as work,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [Path(work) / f"{i}.o" for i in range(len(library.units))]
        left_out = [
            remark
            for remark in pool.map(
                functools.partial(_compile_unit, compiler), library.units, objects
            )
            if remark
        ]
        built = Path(work) / path.name
        made = [str(unit) for unit in objects if unit.exists()]
        _run([compiler, "-shared", *made, *library.link, "-o", str(built)])
        keep_private(built)
        built.replace(path)  # another process may have been faster, with the same library
    return left_out


def _compile_unit(compiler: str, unit: Unit, made: Path) -> str | None:
    """Why an optional unit is left out, or None. Raises BuildError for any other."""
    try:
        _run([compiler, *unit.flags, "-c", str(unit.source), "-o", str(made)])
    except BuildError as error:
        if not unit.optional:
            raise
        made.unlink(missing_ok=True)
        return f"{unit.optional} are left out: {error}"
    return None


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error:" in line), lines[0])
        what = next((Path(part).name for part in command if part.endswith(".cpp")), "linking")
        raise BuildError(f"{command[0]} failed on {what}: {reason}") from error


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
