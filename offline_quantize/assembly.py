"""Writing a checkpoint whole or not at all, tensor by tensor, resumable at any point.

The target directory holds, while a run is under way, `*.partial` files, a job file that says what
the run is, and a journal with one line per finished tensor. A weight file gets its name when all
its tensors are in it and on disk. `config.json` comes last, so a checkpoint without it is not one;
then job file and journal go.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from offline_quantize.files import partial, publish, sync_directory, write_bytes, write_json
from offline_quantize.tensorfile import (
    Entry,
    FileLayout,
    read_pieces,
    tensor_bytes,
    write_at,
)
from precalib_kernels.errors import OutputError

MANIFEST = "precalib.json"
JOB = "precalib.job.json"
JOURNAL = "precalib.journal.jsonl"
MARGIN_BYTES = 64 << 20  # manifest, journal and the file system's own needs


class Progress(Protocol):
    """What a run tells about itself while it works."""

    def begin(self, name: str) -> None:
        """A tensor is being worked on."""

    def advance(self, nbytes: int) -> None:
        """So many source bytes are done."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One source tensor on its way into a weight file.

    key:     name in the journal.
    outputs: tensors it becomes.
    nbytes:  source bytes, for the progress display.
    make:    computes the outputs and a report; None to copy bytes [begin, end) of `origin`.
    """

    key: str
    file: str
    outputs: Sequence[str]
    nbytes: int
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]] | None = None
    origin: tuple[Path, Entry] | None = None


def prepare_target(target: Path, fingerprint: Mapping[str, Any], size: int, resume: bool) -> bool:
    """Make the target directory ready; true if everything is there already.

    Raises OutputError when it holds something else, when another run began there and `resume` is
    off or that run differs (the differing key is named), or when the disk is too full.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give another output directory")
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if JOB in names:
        if not resume:
            raise OutputError(
                f"{target}: holds an unfinished run; add --resume to continue it, "
                "or remove the directory"
            )
        refuse_other(target, _read_json(target / JOB), fingerprint)
    elif MANIFEST in names and "config.json" in names and resume:
        return True
    elif names:
        raise OutputError(
            f"{target}: exists and is not empty; give a new directory or remove this one"
        )
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    done = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) if names else 0
    free = shutil.disk_usage(existing).free
    if size + MARGIN_BYTES > free + done:
        raise OutputError(
            f"{target}: {(size + MARGIN_BYTES) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB "
            "are free; make room or choose another disk"
        )
    if JOB not in names:
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / JOB, dict(fingerprint))
    return False


def write_shards(
    target: Path,
    shards: Mapping[str, FileLayout],
    tasks: Iterable[Task],
    jobs: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Fill and publish all weight files; returns the report of every task by key.

    jobs: tensors worked on at once, each on one thread, so that results do not depend on it.
    """
    journal = _Journal(target / JOURNAL)
    pending: dict[str, list[Task]] = {file: [] for file in shards}
    for task in tasks:
        pending[task.file].append(task)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for file, layout in shards.items():
                _write_shard(target / file, layout, pending[file], pool, journal, progress)
    finally:
        torch.set_num_threads(threads)
        journal.close()
    return journal.reports


def finish(
    target: Path,
    carried: Mapping[str, Path],
    small: Mapping[str, bytes],
    manifest: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] | None,
    shards: Iterable[str],
) -> None:
    """Copy the other files, write manifest and configuration, and close the run.

    manifest: builds the manifest from size and sha256 of every other file; None for none.
    small:    generated files; the last one makes the checkpoint valid.
    """
    for name, origin in carried.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, partial(path))
        publish(path)
    *early, last = small
    for name in early:
        write_bytes(target / name, small[name])
    if manifest is not None:
        files = {name: digest(target / name) for name in sorted((*shards, *carried, *early))}
        files[last] = {"size": len(small[last]), "sha256": hashlib.sha256(small[last]).hexdigest()}
        write_json(target / MANIFEST, manifest(files))
    write_bytes(target / last, small[last])
    for leftover in (JOURNAL, JOB):
        (target / leftover).unlink(missing_ok=True)
    sync_directory(target)


def digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


class _Journal:
    """Finished tensors: one JSON line each, appended after the tensor's bytes were written.

    A line carries the digest of those bytes, so a resumed run can tell a finished tensor from one
    whose bytes were lost with the machine's memory. A torn last line is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.reports: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    record = json.loads(line)
                    key, sha256, report = record["tensor"], record["sha256"], record["report"]
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self.reports[key], self.digests[key] = report, sha256
                whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)
        self._lock = threading.Lock()

    def add(self, key: str, sha256: str, report: dict[str, Any]) -> None:
        line = json.dumps({"tensor": key, "sha256": sha256, "report": report}) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            self.reports[key], self.digests[key] = report, sha256

    def close(self) -> None:
        self._file.close()


def _write_shard(
    path: Path,
    layout: FileLayout,
    tasks: Sequence[Task],
    pool: ThreadPoolExecutor,
    journal: _Journal,
    progress: Progress,
) -> None:
    if path.exists():  # published by an earlier run
        for task in tasks:
            progress.advance(task.nbytes)
        return
    written = partial(path)
    known = written.exists() and written.stat().st_size == layout.size
    descriptor = os.open(written, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(descriptor, layout.size)
        write_at(descriptor, layout.header, 0)

        def work(task: Task) -> None:
            progress.begin(task.key)
            if not (known and _is_written(descriptor, layout, task, journal)):
                _run(descriptor, layout, task, journal)
            progress.advance(task.nbytes)

        futures = [pool.submit(work, task) for task in tasks]
        finished, unfinished = wait(futures, return_when=FIRST_EXCEPTION)
        for future in unfinished:
            future.cancel()
        for future in finished:
            future.result()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        os.close(descriptor)
    publish(path)


def _run(descriptor: int, layout: FileLayout, task: Task, journal: _Journal) -> None:
    sha256 = hashlib.sha256()
    report: dict[str, Any] = {}
    if task.make is None:
        assert task.origin is not None
        path, entry = task.origin
        offset = layout.entries[task.outputs[0]].begin
        for piece in read_pieces(path, entry.begin, entry.end):
            write_at(descriptor, piece, offset)
            sha256.update(piece)
            offset += len(piece)
    else:
        tensors, report = task.make()
        for name in task.outputs:
            data = tensor_bytes(tensors[name])
            write_at(descriptor, data, layout.entries[name].begin)
            sha256.update(data)
    journal.add(task.key, sha256.hexdigest(), report)


def _is_written(descriptor: int, layout: FileLayout, task: Task, journal: _Journal) -> bool:
    if task.key not in journal.digests:
        return False
    sha256 = hashlib.sha256()
    for name in task.outputs:
        entry, offset = layout.entries[name], layout.entries[name].begin
        while offset < entry.end:
            piece = os.pread(descriptor, min(16 << 20, entry.end - offset), offset)
            sha256.update(piece)
            offset += len(piece)
    return sha256.hexdigest() == journal.digests[task.key]


def refuse_other(target: Path, job: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise OutputError that names the first key in which two runs differ."""
    for key in sorted(job.keys() | wanted.keys()):
        if job.get(key) != wanted.get(key):
            raise OutputError(
                f"{target}: the run there has another '{key}' "
                f"({_short(job.get(key))} instead of {_short(wanted.get(key))}); resume with "
                "the same options and source, or remove the directory"
            )


def read_manifest(target: Path) -> dict[str, Any]:
    """The manifest of a finished checkpoint. Raises OutputError if it is missing or damaged."""
    return _read_json(target / MANIFEST)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: missing or damaged ({error}); quantize again") from error
    if not isinstance(value, dict):
        raise OutputError(f"{path}: damaged; quantize again")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
