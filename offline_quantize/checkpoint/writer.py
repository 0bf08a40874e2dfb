"""Writing weight files whole or not at all, tensor by tensor, resumable at any point.

A weight file gets its name when all its tensors are in it and on disk; `run` says what else a
directory holds while this goes on.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from offline_quantize.checkpoint.atomic_files import JOURNAL, partial, publish
from offline_quantize.checkpoint.journal import Journal
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import Run
from offline_quantize.checkpoint.safetensors_file import (
    COPY_BYTES,
    FileLayout,
    TensorLocation,
    read_pieces,
    tensor_bytes,
    write_at,
)
from offline_quantize.checkpoint.worker_pool import worker_pool
from precalib_kernels.errors import FormatError, SourceError, UnfitError


@dataclasses.dataclass(frozen=True)
class WriteJob:
    """One source tensor on its way into a weight file.

    key:     name in the journal.
    outputs: tensors it becomes.
    nbytes:  source bytes, for the progress display.
    make:    computes the outputs and a report; None to copy the bytes of `origin`.
    """

    key: str
    file: str
    outputs: Sequence[str]
    nbytes: int
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]] | None = None
    origin: TensorLocation | None = None

    @classmethod
    def copy(cls, file: str, origin: TensorLocation) -> "WriteJob":
        """A tensor that keeps its name and bytes."""
        return cls(origin.name, file, [origin.name], origin.entry.nbytes, origin=origin)


def write_shards(
    run: Run, batches: Iterable[Sequence[WriteJob]], workers: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Fill and publish all weight files of a run that has begun; the reports of `make` by key.

    batches: jobs, batch after batch (`by_file`); the next batch is asked for when one is done.
    workers: tensors worked on at once, each on one thread, so that results do not depend on it.

    Raises what `make` raises. An UnfitError does not stop the others, so that all are found in one
    run; it comes at the end and has the text of each by key. If an error tells of unfit data, which
    no later run could repair, all that was written is removed.
    """
    unfit: dict[str, str] = {}
    journal = Journal(run.target / JOURNAL)
    shards = {file: _Shard(run.target / file, layout) for file, layout in run.files.shards.items()}
    try:
        for shard in shards.values():
            if not shard.missing:  # it holds no tensor, so no job would open it
                shard.open()
        with worker_pool(workers) as pool:
            for batch in batches:
                _write_batch(batch, shards, pool, journal, unfit, progress)
                if not unfit:
                    _publish_full(shards.values(), journal)
        if unfit:
            raise UnfitError("; ".join(unfit[key] for key in sorted(unfit)), unfit)
    except (SourceError, FormatError) as error:
        if not isinstance(error.__cause__, OSError):
            run.discard()
        raise
    finally:
        for shard in shards.values():
            shard.close()
        journal.close()
    return journal.reports


def by_file(run: Run, jobs: Iterable[WriteJob]) -> Iterator[list[WriteJob]]:
    """A batch for each weight file, so that files are finished one after the other."""
    batches: dict[str, list[WriteJob]] = {file: [] for file in run.files.shards}
    for job in jobs:
        batches[job.file].append(job)
    yield from batches.values()


class _Shard:
    """A weight file on its way: opened for its first tensor, published after its last one."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self.path = path
        self.layout = layout
        self.missing = len(layout.entries)
        self.descriptor: int | None = None
        self.known = False  # whether an earlier run left its bytes

    def open(self) -> None:
        """Make the partial file, or take up the one of an earlier run."""
        if self.descriptor is not None:
            return
        written = partial(self.path)
        if self.path.exists():  # published by an earlier run; its bytes are looked at like others
            self.path.replace(written)
        self.known = written.exists() and written.stat().st_size == self.layout.size
        self.descriptor = os.open(written, os.O_RDWR | os.O_CREAT, 0o644)
        os.truncate(self.descriptor, self.layout.size)
        write_at(self.descriptor, self.layout.header, 0)

    def close(self) -> None:
        """Close the file, whatever its state."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _write_batch(
    jobs: Sequence[WriteJob],
    shards: Mapping[str, _Shard],
    pool: ThreadPoolExecutor,
    journal: Journal,
    unfit: dict[str, str],
    progress: Progress,
) -> None:
    """Write the tensors of all jobs; those that cannot be quantized are noted in `unfit`."""
    for job in jobs:
        shards[job.file].open()

    def work(job: WriteJob) -> None:
        shard = shards[job.file]
        assert shard.descriptor is not None
        progress.begin(job.key)
        known = shard.known and _is_written(shard.descriptor, shard.layout, job, journal)
        if not known:
            try:
                _run(shard.descriptor, shard.layout, job, journal)
            except UnfitError as error:
                unfit[job.key] = str(error)
        progress.advance(job.nbytes)

    futures = [pool.submit(work, job) for job in jobs]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # also when interrupted: nothing may run on once the file is closed
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
    for job in jobs:
        shards[job.file].missing -= len(job.outputs)


def _publish_full(shards: Iterable[_Shard], journal: Journal) -> None:
    """Give the files that have all their tensors their names."""
    for shard in shards:
        if shard.descriptor is not None and not shard.missing:
            shard.close()
            journal.sync()
            publish(shard.path)


def _run(descriptor: int, layout: FileLayout, job: WriteJob, journal: Journal) -> None:
    sha256 = hashlib.sha256()
    report: dict[str, Any] = {}
    if job.make is None:
        assert job.origin is not None
        entry = job.origin.entry
        offset = layout.entries[job.outputs[0]].begin
        for piece in read_pieces(job.origin.path, entry.begin, entry.end):
            write_at(descriptor, piece, offset)
            sha256.update(piece)
            offset += len(piece)
    else:
        tensors, report = job.make()
        for name in job.outputs:
            data = tensor_bytes(tensors[name])
            write_at(descriptor, data, layout.entries[name].begin)
            sha256.update(data)
    journal.add(job.key, sha256.hexdigest(), report)


def _is_written(descriptor: int, layout: FileLayout, job: WriteJob, journal: Journal) -> bool:
    if job.key not in journal.digests:
        return False
    sha256 = hashlib.sha256()
    for name in job.outputs:
        entry, offset = layout.entries[name], layout.entries[name].begin
        while offset < entry.end:
            piece = os.pread(descriptor, min(COPY_BYTES, entry.end - offset), offset)
            sha256.update(piece)
            offset += len(piece)
    return sha256.hexdigest() == journal.digests[job.key]
