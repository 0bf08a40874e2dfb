"""Writing a checkpoint whole or not at all, tensor by tensor, resumable at any point.

The target directory holds, while a run is under way, `*.partial` files, a job file that says what
the run is, and a journal with one line per finished tensor. A weight file gets its name when all
its tensors are in it and on disk. `config.json` comes last, so a checkpoint without it is not one;
then job file and journal go.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import (
    JOB,
    JOURNAL,
    MANIFEST,
    partial,
    publish,
    read_json,
    sync_directory,
    write_bytes,
    write_json,
)
from offline_quantize.checkpoint.safetensors_file import (
    COPY_BYTES,
    Entry,
    FileLayout,
    read_pieces,
    tensor_bytes,
    write_at,
)
from precalib_kernels.errors import FormatError, OutputError, SourceError, UnfitError

MARGIN_BYTES = 64 << 20  # manifest, journal and the file system's own needs


class Progress(Protocol):
    """What a run tells about itself while it works."""

    def begin(self, name: str) -> None:
        """A tensor is being worked on."""

    def advance(self, nbytes: int) -> None:
        """So many source bytes are done."""


@dataclasses.dataclass(frozen=True)
class WriteJob:
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


def check_target(
    target: Path,
    source: Path,
    fingerprint: Mapping[str, Any],
    size: int,
    resume: bool,
    completion_marker: str | None = None,
) -> bool:
    """Whether the target directory holds a finished run already; nothing is written.

    completion_marker: file that only a finished run leaves behind; the caller looks whether it is
        the same run.

    Raises OutputError when it is the source or lies inside it, when it holds something else, when
    another run began there and `resume` is off or that run differs (the differing key is named),
    or when the disk is too full.
    """
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise OutputError(f"{target}: lies in the source; give a directory outside of {source}")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give another output directory")
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if JOB in names:
        if not resume:
            raise OutputError(
                f"{target}: holds an unfinished run; add --resume to continue it, "
                "or remove the directory"
            )
        job = read_json(target / JOB, OutputError, "remove the directory and begin again")
        refuse_other(target, job, fingerprint)
        if "config.json" in names:
            return True
    elif resume and {completion_marker, "config.json"} <= names:
        return True
    elif names - {partial(target / JOB).name}:  # a run killed before it could say what it is
        raise OutputError(
            f"{target}: exists and is not empty; give a new directory or remove this one"
        )
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    done = sum(_allocated(path) for path in target.rglob("*")) if names else 0
    free = shutil.disk_usage(existing).free
    if size + MARGIN_BYTES > free + done:
        raise OutputError(
            f"{target}: {(size + MARGIN_BYTES) / 1e9:.2f} GB are needed and "
            f"{(free + done) / 1e9:.2f} GB are free; make room or choose another disk"
        )
    return False


def _allocated(path: Path) -> int:
    """Bytes of disk that a file takes; a partial weight file has its full size from the start."""
    status = path.stat()
    return min(status.st_size, 512 * status.st_blocks) if path.is_file() else 0


@contextlib.contextmanager
def lock_output(target: Path, fingerprint: Mapping[str, Any]) -> Iterator[None]:
    """Make the target directory, say in it what the run is, and keep other processes out of it.

    Raises OutputError when that is not possible or when writing fails at any later point; what
    was done then stays there and a later run can continue it.
    """
    descriptor = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_RDONLY)
        _lock(descriptor, target)
        if not (target / JOB).exists():
            write_json(target / JOB, dict(fingerprint))
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or target}: cannot be written ({error.strerror}); "
            "put that right and run the same command again"
        ) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{target}: another process is writing there; wait for it or give another directory"
        ) from None
    except OSError:
        return  # a file system without locks


def write_shards(
    target: Path,
    shards: Mapping[str, FileLayout],
    tasks: Iterable[WriteJob],
    jobs: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Fill and publish all weight files; returns the report of every task by key.

    jobs: tensors worked on at once, each on one thread, so that results do not depend on it.

    Raises what a task raises. An UnfitError does not stop the others, so that all are found in one
    run; it comes at the end and has the text of each by key. If an error tells of unfit data, which
    no later run could mend, all that was written is removed.
    """
    unfit: dict[str, str] = {}
    journal = _Journal(target / JOURNAL)
    pending: dict[str, list[WriteJob]] = {file: [] for file in shards}
    for task in tasks:
        pending[task.file].append(task)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for file, layout in shards.items():
                _write_shard(target / file, layout, pending[file], pool, journal, unfit, progress)
        if unfit:
            raise UnfitError("; ".join(unfit[key] for key in sorted(unfit)), unfit)
    except (SourceError, FormatError) as error:
        if not isinstance(error.__cause__, OSError):
            _discard(target, shards)
        raise
    finally:
        torch.set_num_threads(threads)
        journal.close()
    return journal.reports


def _discard(target: Path, shards: Iterable[str]) -> None:
    for path in (target / name for name in (*shards, JOURNAL, JOB)):
        path.unlink(missing_ok=True)
        partial(path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or a mount point
        target.rmdir()


def finish(
    target: Path,
    carried: Mapping[str, Path],
    small: Mapping[str, bytes],
    manifest: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] | None,
    shards: Iterable[str],
    progress: Progress,
) -> None:
    """Copy the other files, write manifest and configuration, and close the run.

    manifest: builds the manifest from size and sha256 of every other file; None for none.
    small:    generated files; the last one makes the checkpoint valid.
    """
    for name, origin in carried.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial(path).open("wb") as file:
            for piece in read_pieces(origin):
                file.write(piece)
        publish(path)
    *early, last = small
    for name in early:
        write_bytes(target / name, small[name])
    if manifest is not None:
        names = sorted((*shards, *carried, *early))
        files = {name: digest(target / name, progress) for name in names}
        files[last] = {"size": len(small[last]), "sha256": hashlib.sha256(small[last]).hexdigest()}
        write_json(target / MANIFEST, manifest(files))
    write_bytes(target / last, small[last])
    clean_up(target)


def clean_up(target: Path) -> None:
    """Remove what only an unfinished run needs; the job file last, as it tells of one."""
    for name in (JOURNAL, JOB):
        (target / name).unlink(missing_ok=True)
        sync_directory(target)


def digest(path: Path, progress: Progress) -> dict[str, Any]:
    """Size and sha256 of a file."""
    progress.begin(f"sha256 of {path.name}")
    sha256, size = hashlib.sha256(), 0
    for piece in read_pieces(path):
        sha256.update(piece)
        size += len(piece)
        progress.advance(len(piece))
    return {"size": size, "sha256": sha256.hexdigest()}


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
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    key, sha256, report = record["tensor"], record["sha256"], record["report"]
                    self.reports[key], self.digests[key] = dict(report), sha256
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
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

    def sync(self) -> None:
        """Flush to disk, as must happen before a weight file gets its name."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _write_shard(
    path: Path,
    layout: FileLayout,
    tasks: Sequence[WriteJob],
    pool: ThreadPoolExecutor,
    journal: _Journal,
    unfit: dict[str, str],
    progress: Progress,
) -> None:
    """Fill one weight file and publish it, unless a tensor is unfit, here or in an earlier one."""
    written = partial(path)
    if path.exists():  # published by an earlier run; its bytes are looked at like all others
        path.replace(written)
    known = written.exists() and written.stat().st_size == layout.size
    descriptor = os.open(written, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(descriptor, layout.size)
        write_at(descriptor, layout.header, 0)

        def work(task: WriteJob) -> None:
            progress.begin(task.key)
            if not (known and _is_written(descriptor, layout, task, journal)):
                try:
                    _run(descriptor, layout, task, journal)
                except UnfitError as error:
                    unfit[task.key] = str(error)
            progress.advance(task.nbytes)

        futures = [pool.submit(work, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when interrupted: nothing may run on once the file is closed
            for future in futures:
                future.cancel()
            wait(futures)
        for future in futures:
            if not future.cancelled():
                future.result()
    finally:
        os.close(descriptor)
    journal.sync()
    if not unfit:
        publish(path)


def _run(descriptor: int, layout: FileLayout, task: WriteJob, journal: _Journal) -> None:
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


def _is_written(descriptor: int, layout: FileLayout, task: WriteJob, journal: _Journal) -> bool:
    if task.key not in journal.digests:
        return False
    sha256 = hashlib.sha256()
    for name in task.outputs:
        entry, offset = layout.entries[name], layout.entries[name].begin
        while offset < entry.end:
            piece = os.pread(descriptor, min(COPY_BYTES, entry.end - offset), offset)
            sha256.update(piece)
            offset += len(piece)
    return sha256.hexdigest() == journal.digests[task.key]


def refuse_other(target: Path, job: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise OutputError that names the first key in which two runs differ."""
    if difference := _difference(job, wanted):
        key, there, here = difference
        raise OutputError(
            f"{target}: the run there has another '{key}' "
            f"({_short(there)} instead of {_short(here)}); resume with "
            "the same options and source, or remove the directory"
        )


def _difference(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return None if there == here else (key, there, here)
    for name in sorted(there.keys() | here.keys()):
        inner = f"{key}: {name}" if key else name
        if found := _difference(there.get(name), here.get(name), inner):
            return found
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
