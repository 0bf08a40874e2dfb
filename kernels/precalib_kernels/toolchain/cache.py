"""The folder of libraries that were compiled at first use, and who may write there.

A library runs code as the user who loads it. So only files are loaded that nobody but the user, or
root, can have written, from a folder of which the same holds.
"""

import os
import stat
from pathlib import Path


class UnsafeCacheError(OSError):
    """The folder belongs to somebody else; its text says what to do."""


def cache_directory() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/precalib, by default ~/.cache/precalib."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "precalib"


def make_private(directory: Path) -> None:
    """Make the folder, for its user alone, or take the right to write from all others.

    Raises UnsafeCacheError for a folder, or a link to one, of another user, OSError if it cannot be
    made.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if not {status.st_uid, directory.lstat().st_uid} <= _trusted():
        raise UnsafeCacheError(
            f"{directory} belongs to another user, who could put a library there; set "
            "XDG_CACHE_HOME to a folder of your own"
        )
    if _others_write(status):
        directory.chmod(stat.S_IMODE(status.st_mode) & ~0o022)


def keep_private(path: Path) -> None:
    """Take the right to write a file from all but its owner."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def why_unsafe(path: Path) -> str | None:
    """Why the library at `path` is not to be loaded; None if it may be, or is not there."""
    try:
        file, folder, named = path.lstat(), path.parent.stat(), path.parent.lstat()
    except OSError:
        return None  # not there
    if not stat.S_ISREG(file.st_mode):
        return "it is a link or no file"
    if not {file.st_uid, folder.st_uid, named.st_uid} <= _trusted():
        return "it or its folder belongs to another user"
    if _others_write(file) or _others_write(folder):
        return "it or its folder can be written by others"
    return None


def _trusted() -> set[int]:
    return {os.geteuid(), 0}


def _others_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & 0o022)
