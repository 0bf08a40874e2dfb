"""The plugin's part of `precalib doctor`. Importing this needs no vLLM; diagnosing does."""

from collections.abc import Iterator

from precalib_kernels.diagnosis import Finding


def diagnose() -> Iterator[Finding]:
    """Whether vLLM knows the quantization method, and which backends can run here.

    Raises whatever importing vLLM raises.
    """
    backends = list(_backends())  # first: this tells best what is wrong with this vLLM
    yield _registration()
    yield from backends


def _registration() -> Finding:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from vllm_precalib import register

    register()
    if "precalib" in QUANTIZATION_METHODS:
        return Finding("vLLM plugin", "ok", "'precalib' is a registered quantization method")
    return Finding(
        "vLLM plugin", "missing", "'precalib' did not register", "is VLLM_PLUGINS set without it?"
    )


def _backends() -> Iterator[Finding]:
    from vllm_precalib.backends import describe

    for name, reason in describe():
        yield Finding(f"backend {name}", "note" if reason else "ok", reason or "can run")
