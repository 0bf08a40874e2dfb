"""The compiled kernels: one library for x86-64, with one copy per level of instructions.

The build imports this module to compile them, where there is no torch.
"""

import ctypes
import functools
import platform
from pathlib import Path

from precalib_kernels.native.build import BuildError, Library, Unit, load_library

_HERE = Path(__file__).parent
_COMMON = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
)
_ADDED = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512_vnni": ("-mavx512vbmi", "-mavx512vnni"),
    "avx512_bf16": ("-mavx512bf16",),
    "amx": ("-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
_LINK: tuple[str, ...] = ()
LEVELS = tuple(_ADDED)  # each has all instructions of those before it


def definition() -> Library:
    """What the library is made of. Raises BuildError on other processors than x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are for x86-64, this is {platform.machine()}")
    units = [Unit(_HERE / "entry.cpp", _COMMON)]
    flags: tuple[str, ...] = ()
    for level, added in _ADDED.items():
        flags += added
        name = f"-DPRECALIB_LEVEL={level}"
        units.append(Unit(_HERE / "level.cpp", (*_COMMON, *flags, name)))
    return Library("cpu", tuple(units), _LINK)


@functools.cache
def load() -> ctypes.CDLL:
    """The library of kernels, compiled if it is not there yet.

    Raises BuildError with the reason why there is none for this machine.
    """
    # OpenMP stays undefined in the library: the runtime that torch loads provides it.
    import torch  # noqa: F401

    library = load_library(definition())
    library.precalib_linear.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_void_p,) * 4,
        *(ctypes.c_int64,) * 2,
    )
    library.precalib_linear.restype = None
    library.precalib_plan_bytes.restype = ctypes.c_int64
    return library


@functools.cache
def machine_levels() -> tuple[str, ...]:
    """Levels this processor has, lowest first; empty without AVX2. Raises BuildError."""
    return LEVELS[: load().precalib_level() + 1]
