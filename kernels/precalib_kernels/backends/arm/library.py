"""The compiled kernels for aarch64: one library, with one copy of the kernels per ISA.

The build imports this module to compile them, where there is no torch.
"""

import ctypes
import functools
import platform
from pathlib import Path

from precalib_kernels.backends.x86 import library as x86
from precalib_kernels.toolchain.compile import BuildError, Library, Unit, load_library
from precalib_kernels.toolchain.isa import Isa

SOURCES = Path(__file__).parent / "csrc"


class ArmIsa(Isa):
    """An instruction set of aarch64."""

    def library(self) -> ctypes.CDLL:
        """`load()`."""
        return load()


DOTPROD = ArmIsa("dotprod", ("asimddp",), ("-march=armv8.2-a+dotprod",))
I8MM = ArmIsa("i8mm", ("i8mm",), ("-march=armv8.2-a+dotprod+i8mm",))
ISAS = (DOTPROD, I8MM)  # ascending


def sources(isas: tuple[ArmIsa, ...] = ISAS, flags: tuple[str, ...] = ()) -> Library:
    """What the library is made of, on any machine: a cross-compiler can build it.

    flags: of the compiler, besides the usual ones.
    """
    flags = (*x86.COMMON_FLAGS, *flags)
    units = [
        Unit(SOURCES / "isa_dispatch.cpp", flags),
        Unit(x86.SOURCES / "gather_rows.cpp", flags),
        Unit(x86.SOURCES / "torch_binding.cpp", flags),
    ]
    for isa in isas:
        # A compiler that does not know a newer ISA still compiles the others.
        optional = "" if isa == DOTPROD else f"kernels for {isa.name}"
        own = (*flags, *isa.flags, f"-DPRECALIB_ISA={isa.name}")
        units.append(Unit(SOURCES / "linear.cpp", own, optional))
    return Library("cpu", tuple(units))


def definition() -> Library:
    """`sources` for this machine. Raises BuildError on other processors than aarch64."""
    if platform.machine() != "aarch64":
        raise BuildError(f"the kernels are for aarch64, this is {platform.machine()}")
    return sources()


@functools.cache
def load() -> ctypes.CDLL:
    """The library of kernels, compiled if it is not there yet, as torch's `precalib::cpu_…`.

    Raises BuildError with the reason why there is none for this machine.
    """
    import torch

    made = definition()
    x86.check_torch_version(torch.__version__)
    if runtime := openmp_runtime(Path("/proc/self/maps").read_text()):
        # torch's wheels for aarch64 keep it to themselves; the kernels look for its functions.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    library = load_library(made)
    library.precalib_isa_index.restype = ctypes.c_int64
    library.precalib_isa_state.argtypes = (ctypes.c_int64,)
    library.precalib_layout_bytes.restype = ctypes.c_int64
    x86.register(library)
    return library


def openmp_runtime(maps: str) -> str | None:
    """File of the GNU OpenMP runtime in a process, of several that of torch; None without one.

    maps: /proc/PID/maps.
    """
    fields = (line.split(None, 5) for line in maps.splitlines())
    files = [field[5] for field in fields if len(field) == 6]
    found = [file for file in files if Path(file).name.startswith("libgomp")]
    return min(found, key=lambda file: "torch" not in file, default=None)


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """ISAs that this machine has and the library is compiled for, ascending; may be empty.

    The operator's argument `isa` is an index of this. Raises BuildError.
    """
    return tuple(isa.name for isa in ISAS if isa.supported())
