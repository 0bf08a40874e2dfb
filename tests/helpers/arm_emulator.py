"""Products by the Arm kernels, in an emulator or on an Arm processor.

`tools()` says what compiles and runs them: on aarch64 the compiler alone; elsewhere a
cross-compiler and qemu's user mode, which runs a program of another processor as a process. There
is no torch in the emulator: a small C++ program reads problems from a file and writes results.
"""

import dataclasses
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.memory_layout import ArmLayout
from precalib_kernels.toolchain import compile as build

HERE = Path(__file__).parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
MISSING = (
    "there is no Arm emulator: {} is not on the PATH; "
    "on Debian, apt-get install g++-aarch64-linux-gnu qemu-user-static"
)
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of `Type` in kernel_table.h
ISAS = tuple(isa.name for isa in library.ISAS)


@dataclasses.dataclass(frozen=True)
class Tools:
    """compiler: of C++ for aarch64; emulator: the command that runs its programs, if any."""

    compiler: str
    emulator: tuple[str, ...] = ()


def tools() -> Tools | str:
    """What there is, or the sentence that says what is missing."""
    if platform.machine() == "aarch64":
        return Tools(build.find_compiler()) if build.find_compiler() else "no C++ compiler"
    compiler = shutil.which(COMPILER)
    if compiler is None:
        return MISSING.format(COMPILER)
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        return MISSING.format(" or ".join(EMULATORS))
    return Tools(compiler, (emulator, "-L", sysroot(compiler)))


def sysroot(compiler: str) -> str:
    """Where the cross-compiler's dynamic linker and libraries are."""
    command = [compiler, "-print-file-name=libc.so.6"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve().parent.parent)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product: y = x·Ŵᵀ + bias from a repacked weight, by the copy for an ISA."""

    layout: ArmLayout
    packed: Tensor
    x: Tensor
    isa: str
    bias: Tensor | None = None

    def to_bytes(self) -> bytes:
        """As run_products.cpp reads it."""
        parts = [
            self.layout.to_bytes(),
            _bytes(self.packed),
            _bytes(self.x),
            b"" if self.bias is None else _bytes(self.bias),
        ]
        sizes = [len(self.x), TYPES.index(self.x.dtype), ISAS.index(self.isa)]
        sizes += [*map(len, parts), self.outputs * len(self.x) * self.x.element_size()]
        return torch.tensor(sizes).numpy().tobytes() + b"".join(parts)

    @property
    def outputs(self) -> int:
        return sum(self.layout.shard_sizes)

    @property
    def result(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of y."""
        return (len(self.x), self.outputs), self.x.dtype


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a repacked weight by number, ids [M] int64, rounded to a type."""

    layout: ArmLayout
    packed: Tensor
    ids: Tensor
    dtype: torch.dtype

    def to_bytes(self) -> bytes:
        """As run_products.cpp reads it."""
        parts = [self.layout.to_bytes(), _bytes(self.packed), _bytes(self.ids), b""]
        y = len(self.ids) * self.layout.columns * self.dtype.itemsize
        sizes = [len(self.ids), TYPES.index(self.dtype), -1, *map(len, parts), y]
        return torch.tensor(sizes).numpy().tobytes() + b"".join(parts)

    @property
    def result(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of y."""
        return (len(self.ids), self.layout.columns), self.dtype


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled library of kernels, and the program that runs it."""

    tools: Tools
    path: Path
    library: Path

    def run(
        self, problems: Sequence[Problem | Rows], work: Path, threads: int = 1
    ) -> list[tuple[Tensor, str]]:
        """Result and kernel of each problem."""
        given, found = work / "problems", work / "results"
        with given.open("wb") as file:
            for problem in problems:
                file.write(problem.to_bytes())
        environment = {"OMP_NUM_THREADS": str(threads), "LD_LIBRARY_PATH": str(self.library.parent)}
        command = [*self.tools.emulator]
        for name, value in environment.items():
            command += ["-E", f"{name}={value}"] if self.tools.emulator else []
        ran = subprocess.run(
            [*command, self.path, given, found],
            capture_output=True,
            text=True,
            env=os.environ | ({} if self.tools.emulator else environment),
        )
        assert ran.returncode == 0, ran.stderr or f"ended by {ran.returncode}"
        kernels = [line.split()[1] for line in ran.stdout.splitlines()]
        results, data, at = [], found.read_bytes(), 0
        for problem in problems:
            shape, dtype = problem.result
            size = shape[0] * shape[1] * dtype.itemsize
            y = torch.frombuffer(bytearray(data[at : at + size] or b"\0"), dtype=torch.uint8)
            results.append(y[:size].view(dtype).view(shape))
            at += size
        assert at == len(data)
        return list(zip(results, kernels, strict=True))


def build_library(found: Tools, path: Path, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Compile the library as the plugin does, but with the compiler of `found`; its remarks."""
    with mock.patch.dict(os.environ, {"CXX": found.compiler}):
        return build.compile_library(library.sources(flags=flags), path)


def build_program(found: Tools, work: Path, flags: tuple[str, ...] = ()) -> Program:
    """The library, which is kept in the user's cache, and the program in `work`."""
    made = library.sources(flags=flags)
    kept = build.cache_directory() / f"arm-{made.file_name()}"
    if not kept.exists():
        assert build_library(found, kept, flags) == ()
    program = work / "run_products"
    command = [found.compiler, "-O1", "-std=c++20", "-fopenmp", *flags]
    subprocess.run([*command, HERE / "run_products.cpp", kept, "-o", program], check=True)
    return Program(found, program, kept)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
