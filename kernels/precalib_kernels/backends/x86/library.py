"""The compiled kernels: one library for x86-64, with one copy of the kernels per ISA.

The build imports this module to compile them, where there is no torch.
"""

import ctypes
import dataclasses
import functools
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from precalib_kernels.toolchain.compile import WARNINGS, BuildError, Library, Unit, load_library
from precalib_kernels.toolchain.isa import Isa

if TYPE_CHECKING:
    from precalib_kernels.backends.x86.memory_layout import X86Layout

SOURCES = Path(__file__).parent / "csrc"
COMMON_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    *WARNINGS,
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",  # GCC 12 finds this in its own AVX-512 intrinsics
)


@dataclasses.dataclass(frozen=True)
class X86Isa(Isa):
    """An instruction set of x86-64."""

    def library(self) -> ctypes.CDLL:
        """`load()`."""
        return load()

    def extended(self, name: str, requires: tuple[str, ...], flags: tuple[str, ...]) -> "X86Isa":
        """This one and more."""
        return X86Isa(name, (*self.requires, *requires), (*self.flags, *flags))


AVX2 = X86Isa("avx2", ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c"))
AVX_VNNI = AVX2.extended("avx_vnni", ("avx_vnni",), ("-mavxvnni",))
AVX512 = AVX2.extended(
    "avx512",
    ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
)
AVX512_VNNI = AVX512.extended(
    "avx512_vnni", ("avx512vbmi", "avx512_vnni"), ("-mavx512vbmi", "-mavx512vnni")
)
AVX512_BF16 = AVX512_VNNI.extended("avx512_bf16", ("avx512_bf16",), ("-mavx512bf16",))
AMX = AVX512_BF16.extended(
    "amx", ("amx_tile", "amx_bf16", "amx_int8"), ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
)
ISAS = (AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX)


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How the library is compiled; other than by default in tests."""

    isas: tuple[X86Isa, ...] = ISAS
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


DEFAULT_OPTIONS = BuildOptions()


def definition(options: BuildOptions = DEFAULT_OPTIONS) -> Library:
    """What the library is made of. Raises BuildError on other processors than x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are for x86-64, this is {platform.machine()}")
    flags = (*COMMON_FLAGS, *options.flags)
    plain = "isa_dispatch.cpp", "gather_rows.cpp", "torch_binding.cpp"
    units = [Unit(SOURCES / name, flags) for name in plain]
    for isa in options.isas:
        # A compiler that does not know a newer ISA still compiles the others.
        optional = "" if isa.name == AVX2.name else f"kernels for {isa.name}"
        own = (*flags, *isa.flags, f"-DPRECALIB_ISA={isa.name}")
        units.append(Unit(SOURCES / "linear.cpp", own, optional))
    return Library("cpu", tuple(units), options.link)


# What `Torch` in torch_binding.cpp needs of libtorch; there the names begin with aoti_torch_.
TORCH_FUNCTIONS = (
    "get_data_ptr",
    "get_dim",
    "get_numel",
    "get_sizes",
    "get_dtype",
    "get_device_type",
    "is_contiguous",
    "empty_strided",
    "delete_tensor_object",
    "library_init_impl",
    "library_impl",
)
TORCH_CONSTANTS = (
    "dtype_float32",
    "dtype_bfloat16",
    "dtype_float16",
    "dtype_uint8",
    "dtype_int64",
    "device_type_cpu",
)
TORCH_FROM, TORCH_BEFORE = (2, 9), (3, 0)  # versions that have them, with these signatures


class TorchStruct(ctypes.Structure):
    """`Torch` of torch_binding.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in TORCH_FUNCTIONS),
        *((name, ctypes.c_int32) for name in TORCH_CONSTANTS),
    )


@functools.cache
def load() -> ctypes.CDLL:
    """The library of kernels, compiled if it is not there yet, as torch's `precalib::cpu_…`.

    Raises BuildError with the reason why there is none for this machine.
    """
    # OpenMP stays undefined in the library: the runtime that torch loads provides it.
    import torch

    check_torch_version(torch.__version__)
    library = load_library(definition())
    for name, result in (
        ("precalib_layout_bytes", ctypes.c_int64),
        ("precalib_isa_index", ctypes.c_int64),
        ("precalib_kernel_table", ctypes.c_int64),
        ("precalib_kernel_name", ctypes.c_char_p),
    ):
        getattr(library, name).restype = result
    library.precalib_isa_state.argtypes = (ctypes.c_int64,)
    library.precalib_kernel_name.argtypes = (ctypes.c_int64,)
    register(library)
    return library


def register(library: ctypes.CDLL) -> None:
    """Make a library of `torch_binding.cpp` and kernels torch's `precalib::cpu_linear`.

    Raises BuildError if the torch here cannot take it.
    """
    import torch

    library.precalib_torch_bytes.restype = ctypes.c_int64
    library.precalib_torch_fields.restype = ctypes.c_char_p
    try:
        libtorch = ctypes.CDLL("libtorch_cpu.so")  # which torch has loaded
    except OSError as error:
        raise BuildError(f"torch {torch.__version__} has no libtorch_cpu.so: {error}") from error
    table = torch_struct(libtorch, torch.__version__)
    fields = library.precalib_torch_fields().decode().split()
    if fields != [*TORCH_FUNCTIONS, *TORCH_CONSTANTS] or (
        library.precalib_torch_bytes() != ctypes.sizeof(TorchStruct)
    ):
        raise BuildError("library.py and torch_binding.cpp differ about the functions of torch")
    if library.precalib_register(ctypes.byref(table)):
        raise BuildError(f"torch {torch.__version__} does not take the operator")


def check_torch_version(version: str) -> None:
    """Raises BuildError for a torch whose C functions may have other signatures."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not TORCH_FROM <= (int(found[1]), int(found[2])) < TORCH_BEFORE:
        first, before = (".".join(map(str, bound)) for bound in (TORCH_FROM, TORCH_BEFORE))
        raise BuildError(
            f"the kernels work with torch from {first} to before {before}, not {version}"
        )


def torch_struct(libtorch: object, version: str) -> TorchStruct:
    """Addresses and constants that the operator needs. Raises BuildError if libtorch lacks one."""
    table = TorchStruct()
    try:
        for name in TORCH_FUNCTIONS:
            function = getattr(libtorch, f"aoti_torch_{name}")
            setattr(table, name, ctypes.cast(function, ctypes.c_void_p))
        for name in TORCH_CONSTANTS:
            setattr(table, name, getattr(libtorch, f"aoti_torch_{name}")())
    except AttributeError as error:
        raise BuildError(f"torch {version} lacks what the kernels need: {error}") from error
    return table


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """ISAs that this machine has and the library is compiled for, ascending; empty without AVX2.

    The operator's argument `isa` is an index of this. Raises BuildError.
    """
    return tuple(isa.name for isa in ISAS if isa.supported())


def takes_nibbles(isa: str) -> bool:
    """Whether an ISA's kernels look entries up by shuffles of 16 bytes, and so read nibbles."""
    (found,) = (known for known in ISAS if known.name == isa)
    return "avx512vbmi" not in found.requires


@dataclasses.dataclass(frozen=True)
class KernelEntry:
    """Which kernel computes products of batch sizes M from first_m to last_m.

    dtype:  of x, as torch names it.
    last_m: None without a limit.
    kernel: as `kernel_table.h` names it; x1 to x3 are its splits of x.
    """

    isa: str
    dtype: str
    first_m: int
    last_m: int | None
    kernel: str


DTYPES = ("float32", "bfloat16", "float16")  # in the order of `Type` in kernel_table.h
_UNLIMITED = 2**63 - 1
_MOST_ENTRIES = 16


def kernel_table(layout: "X86Layout") -> tuple[KernelEntry, ...]:
    """The kernels of a layout for all ISAs and dtypes, by M: the table that products go by.

    It covers ISAs that this machine lacks, too. Raises BuildError.
    """
    library = load()
    struct, entries = layout.to_struct(), []
    for isa in ISAS:
        index = ctypes.c_int64(library.precalib_isa_index(isa.name.encode()))
        for kind, dtype in enumerate(DTYPES):
            rows = (ctypes.c_int64 * 3 * _MOST_ENTRIES)()
            count = library.precalib_kernel_table(
                ctypes.byref(struct), index, ctypes.c_int64(kind), rows, _MOST_ENTRIES
            )
            for first, last, kernel in rows[:count]:
                name = library.precalib_kernel_name(kernel).decode()
                limit = None if last == _UNLIMITED else last
                entries.append(KernelEntry(isa.name, dtype, first, limit, name))
    return tuple(entries)
