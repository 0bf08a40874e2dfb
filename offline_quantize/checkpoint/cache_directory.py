"""Where files are kept that can be computed again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/precalib, by default ~/.cache/precalib; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "precalib"
