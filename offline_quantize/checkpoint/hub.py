"""Checkpoints by name: a local folder, or a download from the Hugging Face hub."""

import re
from pathlib import Path

from offline_quantize.checkpoint.file_patterns import DOWNLOADED, NOT_DOWNLOADED
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

    try:
        taken, left = list(DOWNLOADED), list(NOT_DOWNLOADED)
        return Path(snapshot_download(source, allow_patterns=taken, ignore_patterns=left))
    except Exception as error:  # of the hub, its HTTP client or the system: all the same here
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"{source}: no such folder, and it could not be downloaded from the hub ({reason}); "
            "give the folder of a checkpoint"
        ) from error
