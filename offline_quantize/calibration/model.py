"""The original model, loaded for a forward pass, whole or block by block."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offline_quantize.evaluation.arithmetic import default_dtype
from offline_quantize.evaluation.models import load_original

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY_SHARE = 0.7  # of what is free; the rest is for activations and Hessians


@contextlib.contextmanager
def model_for_pass(
    source: Path, device: str, memory: int | None = None
) -> Iterator["PreTrainedModel"]:
    """The model of an unpacked checkpoint.

    What does not fit into memory stays on disk, and each block is read when its turn comes.

    device: to compute on, "cpu" or "cuda:0".
    memory: bytes of main memory that weights may take; None for a share of what is free.

    Raises SourceError when transformers cannot load the checkpoint, UsageError when it is missing.
    """
    with tempfile.TemporaryDirectory(prefix="precalib-") as folder:
        placement = {
            "device_map": "auto",
            "max_memory": _memory(device, memory),
            "offload_folder": folder,
        }
        yield load_original(source, default_dtype(device), device, placement)


def free_memory(device: str) -> int:
    """Bytes that are free where a device computes."""
    from accelerate.utils import get_max_memory

    free: int = get_max_memory()[_place(device)]
    return free


def _memory(device: str, memory: int | None) -> dict[int | str, int]:
    """Bytes that weights may take on the device and in main memory, for accelerate."""
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    allowed: dict[int | str, int] = {}
    if (place := _place(device)) != "cpu":
        allowed[place] = int(MEMORY_SHARE * free[place])
    allowed["cpu"] = int(MEMORY_SHARE * free["cpu"]) if memory is None else memory
    return allowed


def _place(device: str) -> int | str:
    """A device as accelerate names it."""
    found = torch.device(device)
    return "cpu" if found.type == "cpu" else found.index or 0
