"""Files that appear whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def partial(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + PARTIAL)


def publish(path: Path) -> None:
    """Flush the partial file of `path` to disk and give it its name."""
    written = partial(path)
    descriptor = os.open(written, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    written.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush renames and removals in a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial(path).write_bytes(data)
    publish(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; equal values give equal bytes."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON text of a file, with a newline at its end."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
