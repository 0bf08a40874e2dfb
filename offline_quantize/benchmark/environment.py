"""What is measured on what: processor, versions, commit."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from precalib_kernels.processor import processor_name


def about_machine() -> dict[str, Any]:
    """Processor, versions, and the commit of this package's checkout or None."""
    return {"processor": _processor(), "versions": dict(_versions()), "commit": _commit()}


def _processor() -> str:
    """Name of the processor and of the GPU, if there is one."""
    import torch

    name = processor_name() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("vllm-precalib", "vllm", "torch", "guidellm"):
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _commit() -> str | None:
    """Commit of the checkout that this package lies in; None for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
