"""Which vLLM this plugin is written for, and what it says when it meets another one."""

import contextlib
from collections.abc import Iterator

import vllm
from packaging.specifiers import SpecifierSet

from precalib_kernels.errors import ServingError

SUPPORTED_VLLM = ">=0.32,<0.34"  # also in pyproject.toml; a test compares them


def version_warning(version: str | None = None) -> str | None:
    """One sentence if `version` (default: the installed vLLM) is outside the window."""
    version = version or vllm.__version__
    if SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True):
        return None
    return (
        f"precalib is tested with vLLM {SUPPORTED_VLLM}, this is {version}: it may not work; "
        f"if it does not, install 'vllm{SUPPORTED_VLLM}' or a newer vllm-precalib"
    )


@contextlib.contextmanager
def vllm_names() -> Iterator[None]:
    """Around imports from vLLM: a name it lacks becomes one sentence with the way out.

    Raises ServingError.
    """
    try:
        yield
    except ImportError as error:
        raise ServingError(
            f"vLLM {vllm.__version__} has changed where this precalib needs it ({error}); "
            f"install 'vllm{SUPPORTED_VLLM}' or a newer vllm-precalib"
        ) from error
