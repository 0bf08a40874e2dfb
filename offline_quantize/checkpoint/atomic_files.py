"""Files that appear whole or not at all, and JSON that may be damaged."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from precalib_kernels.errors import OutputError, PrecalibError

MANIFEST = "precalib.json"
CARD = "README.md"
JOB = "precalib.job.json"
JOURNAL = "precalib.journal.jsonl"
TRANSFORMS = "precalib.transforms"
PARTIAL = ".partial"
MAX_JSON_BYTES = 256 << 20  # an index of a million tensors has 150 MB
MAX_JSON_DEPTH = 100  # what is read must be written again, by recursion


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


def lock(descriptor: int, directory: Path) -> None:
    """Lock an open file or directory until it is closed, where the file system has locks.

    Raises OutputError, which names the directory, if another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{directory}: another process is writing there; wait for it or give another directory"
        ) from None
    except OSError:
        return


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial(path).write_bytes(data)
    publish(path)


def check_folder(path: Path, option: str) -> None:
    """Raise OutputError if the folder of a file to write is missing; long work may lie between."""
    if not path.parent.is_dir():
        raise OutputError(f"{option} {path}: there is no folder {path.parent}; make it first")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; equal values give equal bytes."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON text of a file, with a newline at its end."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path, error: type[PrecalibError], remedy: str) -> dict[str, Any]:
    """The JSON object in a file; raises `error` with the remedy if there is none."""
    value = parse_json(path, error, remedy)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object; {remedy}")
    return value


def parse_json(path: Path, error: type[PrecalibError], remedy: str) -> Any:
    """The JSON value in a file of at most MAX_JSON_BYTES.

    Raises `error` with the remedy for anything else, also where a key of an object stands twice
    with different values: readers would not agree on one.
    """
    try:
        if not path.is_file():
            missing = "not a file" if path.exists() else "the file is missing"
            raise error(f"{path}: {missing}; {remedy}")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise error(f"{path}: {size:,} bytes are too many for this file; {remedy}")
        return loads_json(path.read_bytes())
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); {remedy}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not valid JSON ({cause}); {remedy}") from cause


def loads_json(data: bytes) -> Any:
    """The JSON value of a text. Raises ValueError or RecursionError."""
    value = json.loads(data, object_pairs_hook=_unambiguous)
    inner = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not (inner := [part for outer in inner for part in _parts(outer)]):
            return value
    raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")


def _parts(value: Any) -> Iterable[Any]:
    """The lists and objects right inside a list or an object."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, dict | list))


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, there in pairs:
            if there != value[key]:
                raise ValueError(f"key {key[:80]!r} stands twice with different values")
    return value
