"""The compiled kernels: one library for x86-64, with one copy per level of instructions.

The build imports this module to compile them, where there is no torch.
"""

import ctypes
import functools
import platform
from pathlib import Path

from precalib_kernels.toolchain.compile import BuildError, Library, Unit, load_library

_SOURCES = Path(__file__).parent / "csrc"
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
INT8_LEVEL = "avx512_vnni"  # the first that can round inputs to 8 bits
# what `Torch` in torch_binding.cpp needs of libtorch
TORCH_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_numel",
    "aoti_torch_get_sizes",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_is_contiguous",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
)
TORCH_CONSTANTS = (
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_uint8",
    "aoti_torch_device_type_cpu",
)


def definition() -> Library:
    """What the library is made of. Raises BuildError on other processors than x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are for x86-64, this is {platform.machine()}")
    units = [Unit(_SOURCES / name, _COMMON) for name in ("isa_dispatch.cpp", "torch_binding.cpp")]
    flags: tuple[str, ...] = ()
    for level, added in _ADDED.items():
        flags += added
        name = f"-DPRECALIB_LEVEL={level}"
        units.append(Unit(_SOURCES / "linear.cpp", (*_COMMON, *flags, name)))
    return Library("cpu", tuple(units), _LINK)


@functools.cache
def load() -> ctypes.CDLL:
    """The library of kernels, compiled if it is not there yet, as torch's `precalib::cpu_linear`.

    Raises BuildError with the reason why there is none for this machine.
    """
    # OpenMP stays undefined in the library: the runtime that torch loads provides it.
    import torch

    library = load_library(definition())
    library.precalib_plan_bytes.restype = ctypes.c_int64
    try:
        libtorch = ctypes.CDLL("libtorch_cpu.so")  # which torch has loaded
        functions = [
            ctypes.cast(getattr(libtorch, name), ctypes.c_void_p) for name in TORCH_FUNCTIONS
        ]
        constants = [getattr(libtorch, name)() for name in TORCH_CONSTANTS]
    except (OSError, AttributeError) as error:
        raise BuildError(f"torch {torch.__version__} lacks what it needs: {error}") from error
    table = _Torch((ctypes.c_void_p * len(functions))(*functions), tuple(constants))
    if library.precalib_register(ctypes.byref(table)):
        raise BuildError(f"torch {torch.__version__} does not take the operator")
    return library


class _Torch(ctypes.Structure):
    """`Torch` of torch_binding.cpp."""

    _fields_ = (
        ("functions", ctypes.c_void_p * len(TORCH_FUNCTIONS)),
        ("constants", ctypes.c_int32 * len(TORCH_CONSTANTS)),
    )


@functools.cache
def machine_levels() -> tuple[str, ...]:
    """Levels this processor has, lowest first; empty without AVX2. Raises BuildError."""
    return LEVELS[: load().precalib_level() + 1]
