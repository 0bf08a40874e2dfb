"""Checkpoints by name: a local folder, or a download from the Hugging Face hub."""

import re
from pathlib import Path

from precalib_kernels.errors import SourceError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: str) -> Path:
    """Folder of a checkpoint; an id such as "org/model" that is no folder is downloaded.

    Raises SourceError when there is no such folder and nothing could be downloaded.
    """
    path = Path(source)
    if path.exists() or not REPOSITORY.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{source}: no such folder, and it could not be downloaded from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
