"""Compile a C++ source of this package into a shared library, once per machine.

The library's name holds a digest of source, flags, compiler and processor, so a changed source or
another machine sharing the cache never meets a wrong build.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# No contraction: a fused multiply-add would round differently from the torch reference.
FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS = ("-mprefer-vector-width=512", *FLAGS)  # else compilers stop at half of AVX-512


class BuildError(Exception):
    """The library cannot be built here; the text says why."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of native/<name>.cpp, compiled if it is not cached.

    Raises BuildError when there is no compiler or it fails.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++ or clang++) on the PATH")
    marks = (source.read_bytes(), " ".join(FLAGS).encode(), _processor(), _version(compiler))
    digest = hashlib.sha256(b"\0".join(marks)).hexdigest()[:16]
    library = cache_directory() / f"{name}-{digest}.so"
    if not library.exists():
        _compile(compiler, source, library)
    return ctypes.CDLL(str(library))


def cache_directory() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/precalib, by default ~/.cache/precalib."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "precalib"


def _compile(compiler: str, source: Path, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            built = Path(work) / library.name
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # another process may have been faster, with the same bytes
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{compiler} failed on {source.name}: {lines[0]}") from error


def _version(compiler: str) -> bytes:
    done = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    return done.stdout


def _processor() -> bytes:
    """What -march=native depends on: model and features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    seen = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(seen.get(key, "") for key in wanted).encode()
