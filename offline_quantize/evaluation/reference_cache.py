"""What was computed with an original model, kept on disk for the next quantized one."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_quantize.checkpoint.cache_directory import cache_directory
from precalib_kernels.errors import OutputError


def cached(
    kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors computed for a key, from disk if they were computed before.

    kind: begins the file's name;  key: JSON values that the result depends on.

    Raises OutputError, before anything is computed, when the folder cannot be written.
    """
    path = cache_file(kind, key)
    if path.exists():
        try:
            return load_file(path)
        except SafetensorError:  # damaged: computed again and replaced
            path.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    written = Path(name)
    try:
        tensors = compute()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written)
        written.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path.parent, error) from error
    finally:
        written.unlink(missing_ok=True)
    return tensors


def cache_file(kind: str, key: Mapping[str, Any]) -> Path:
    """Where the tensors of a key are kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / "references" / f"{kind}-{digest}.safetensors"


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _unwritable(folder: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(
        f"{folder}: cannot be written ({reason}); set XDG_CACHE_HOME to a folder that can"
    )
