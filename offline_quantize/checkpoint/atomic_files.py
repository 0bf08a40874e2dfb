"""Files that appear whole or not at all, and JSON that may be damaged."""

import json
import os
from pathlib import Path
from typing import Any

from precalib_kernels.errors import PrecalibError

MANIFEST = "precalib.json"
JOB = "precalib.job.json"
JOURNAL = "precalib.journal.jsonl"
TRANSFORMS = "precalib.transforms"
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
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path, error: type[PrecalibError], remedy: str) -> dict[str, Any]:
    """The JSON object in a file; raises `error` with the remedy if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path}: the file is missing; {remedy}") from None
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); {remedy}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not valid JSON ({cause}); {remedy}") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object; {remedy}")
    return value
