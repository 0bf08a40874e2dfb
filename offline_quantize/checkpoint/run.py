"""The protocol of a run that writes a checkpoint and may be broken off at any point.

The target directory holds, while a run is under way, `*.partial` files, a job file that says what
the run is, and a journal with one line per finished tensor. `config.json` comes last, so a
checkpoint without it is not one; then journal and job file go.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import (
    JOB,
    JOURNAL,
    MANIFEST,
    lock,
    partial,
    publish,
    read_json,
    sync_directory,
    write_bytes,
    write_json,
)
from offline_quantize.checkpoint.manifest import (
    FileRecord,
    Manifest,
    RunRecord,
    read_manifest,
    record_file,
)
from offline_quantize.checkpoint.progress import NullProgress, Progress
from offline_quantize.checkpoint.safetensors_file import FileLayout, read_pieces
from offline_quantize.checkpoint.source import CONFIG
from offline_quantize.checkpoint.worker_pool import WorkerPool
from precalib_kernels.errors import OutputError

MARGIN_BYTES = 64 << 20  # manifest, journal and the file system's own needs


@dataclasses.dataclass(frozen=True)
class OutputFiles:
    """Every file that a run writes, but for the manifest.

    shards:         layout of the weight files, by name.
    sidecar_files:  files to copy unchanged: where each comes from, by name.
    metadata_files: contents of the generated files, in the order they are to be written. The last
                    one, config.json, makes the directory a checkpoint.
    """

    shards: Mapping[str, FileLayout]
    sidecar_files: Mapping[str, Path]
    metadata_files: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Exact size of all of them."""
        written = sum(layout.size for layout in self.shards.values())
        copied = sum(path.stat().st_size for path in self.sidecar_files.values())
        return written + copied + sum(len(data) for data in self.metadata_files.values())


class State(enum.Enum):
    """What a target directory holds of a run."""

    NEW = enum.auto()
    UNFINISHED = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what it is, where it writes, and how it begins, goes on and ends.

    `state` comes first and writes nothing; `begin` covers all writing; `finish` comes last in it.

    target:      directory to write.
    source:      directory that is read; the target may not lie in it.
    fingerprint: JSON values that a later run must share to take up this one's work.
    files:       what the finished directory holds.
    record:      what the manifest says of the run, by which a finished run is known; None for
                 an output without a manifest, of which nothing tells that it is finished.
    """

    target: Path
    source: Path
    fingerprint: Mapping[str, Any]
    files: OutputFiles
    record: RunRecord | None = None

    def state(self, resume: bool) -> State:
        """What the target holds of this run.

        resume: whether the user wants to continue what is there.

        Raises OutputError when the target is the source or lies inside it, when it holds something
        else, when another run began there and `resume` is off or that run differs (the differing
        key is named), or when the disk is too full.
        """
        check_place(self.target, self.source)
        names = {path.name for path in self.target.iterdir()} if self.target.is_dir() else set()
        state = State.NEW
        if JOB in names:
            if not resume:
                raise OutputError(
                    f"{self.target}: holds an unfinished run; add --resume to continue it, "
                    "or remove the directory"
                )
            remedy = "remove the directory and begin again"
            self._check_same(read_json(self.target / JOB, OutputError, remedy), self.fingerprint)
            state = State.FINISHED if CONFIG in names else State.UNFINISHED
        elif resume and self.record is not None and {MANIFEST, CONFIG} <= names:
            state = State.FINISHED
        elif names - {partial(self.target / JOB).name}:  # killed before it could say what it is
            raise OutputError(
                f"{self.target}: exists and is not empty; give a new directory or remove this one"
            )
        if state is not State.FINISHED:
            self._check_space()
        elif self.record is not None:
            self._check_same(read_manifest(self.target).run.to_json(), self.record.to_json())
        return state

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Begin or resume: make the directory, say in it what the run is, keep other processes out.

        Raises OutputError when that is not possible or when writing fails at any later point; what
        was done then stays there and a later run can continue it.
        """
        descriptor = None
        try:
            self.target.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.target, os.O_RDONLY)
            lock(descriptor, self.target)
            if not (self.target / JOB).exists():
                write_json(self.target / JOB, dict(self.fingerprint))
            yield
        except OSError as error:
            raise OutputError(
                f"{error.filename or self.target}: cannot be written ({error.strerror}); "
                "put that right and run the same command again"
            ) from error
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def finish(
        self,
        progress: Progress,
        manifest: Callable[[dict[str, FileRecord]], Manifest] | None = None,
        workers: WorkerPool | None = None,
    ) -> None:
        """Copy the sidecar files, write manifest and metadata files, and close the run.

        manifest: makes the manifest from the records of every other file; None for none.
        workers:  read the files for that, a file each; None for this thread.
        """
        files = self.files
        for name, origin in files.sidecar_files.items():
            _copy(origin, self.target / name)
        *early, last = files.metadata_files
        for name in early:
            write_bytes(self.target / name, files.metadata_files[name])
        data = files.metadata_files[last]
        if manifest is not None:
            names = sorted((*files.shards, *files.sidecar_files, *early))
            records = self._records(names, progress, workers)
            records[last] = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
            write_json(self.target / MANIFEST, manifest(records).to_json())
        write_bytes(self.target / last, data)
        self.clean_up()

    def _records(
        self, names: Sequence[str], progress: Progress, workers: WorkerPool | None
    ) -> dict[str, FileRecord]:
        paths = {name: self.target / name for name in names}
        if workers is None:
            return {name: record_file(path, progress) for name, path in paths.items()}
        begun = {
            name: workers.run(
                functools.partial(record_file, path, NullProgress()),
                functools.partial(progress.begin, f"sha256 of {name}"),
                lambda record: progress.advance(record.size),
            )
            for name, path in paths.items()
        }
        try:
            return {name: future.result() for name, future in begun.items()}
        finally:
            workers.abandon(begun.values())

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs; the job file last, as it tells of one."""
        for name in (JOURNAL, JOB):
            (self.target / name).unlink(missing_ok=True)
            sync_directory(self.target)

    def discard(self) -> None:
        """Remove all that an unfinished run has written."""
        for path in (self.target / name for name in (*self.files.shards, JOURNAL, JOB)):
            path.unlink(missing_ok=True)
            partial(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or a mount point
            self.target.rmdir()

    def _check_same(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if difference := _difference(there, here):
            key, found, wanted = difference
            raise OutputError(
                f"{self.target}: the run there has another '{key}' "
                f"({_short(found)} instead of {_short(wanted)}); resume with "
                "the same options and source, or remove the directory"
            )

    def _check_space(self) -> None:
        target, needed = self.target, self.files.nbytes + MARGIN_BYTES
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if target.is_dir():
            free += sum(_allocated(path) for path in target.rglob("*"))
        if needed > free:
            raise OutputError(
                f"{target}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
                "make room or choose another disk"
            )


def check_place(target: Path, source: Path) -> None:
    """Raise OutputError for a target that is a file, or the source or inside of it."""
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise OutputError(f"{target}: lies in the source; give a directory outside of {source}")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give another output directory")


def _copy(origin: Path, path: Path) -> None:
    """Copy a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial(path).open("wb") as file:
        for piece in read_pieces(origin):
            file.write(piece)
    publish(path)


def _allocated(path: Path) -> int:
    """Bytes of disk that a file takes; a partial weight file has its full size from the start."""
    status = path.stat()
    return min(status.st_size, 512 * status.st_blocks) if path.is_file() else 0


def _difference(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two JSON values differ, and what each has there."""
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
