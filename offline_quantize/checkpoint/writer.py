"""Writing weight files whole or not at all, tensor by tensor, resumable at any point.

A weight file gets its name when all its tensors are in it and on disk; `run` says what else a
directory holds while this goes on.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import JOURNAL, partial, publish
from offline_quantize.checkpoint.journal import Journal
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import Run
from offline_quantize.checkpoint.safetensors_file import FileLayout, write_at
from offline_quantize.checkpoint.worker_pool import WorkerPool
from offline_quantize.checkpoint.write_job import WriteJob, WriteTask, Written
from precalib_kernels.errors import FormatError, SourceError, UnfitError


def write_shards(
    run: Run,
    batches: Iterable[Sequence[WriteJob]],
    workers: contextlib.AbstractContextManager[WorkerPool],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Fill and publish all weight files of a run that has begun; the reports of `make` by key.

    batches: jobs, batch after batch (`by_file`); the next batch is asked for when one is done.
    workers: run the jobs, each on one thread, so that results do not depend on their number.

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
        with workers as pool:
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
        self.opened = self.published = False
        self.known = False  # whether an earlier run left its bytes

    def open(self) -> None:
        """Make the partial file, or take up the one of an earlier run."""
        if self.opened:
            return
        written = partial(self.path)
        if self.path.exists():  # published by an earlier run; its bytes are looked at like others
            self.path.replace(written)
        self.known = written.exists() and written.stat().st_size == self.layout.size
        descriptor = os.open(written, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.truncate(descriptor, self.layout.size)
            write_at(descriptor, self.layout.header, 0)
            os.fsync(descriptor)  # before another machine writes into the same block of the disk
        finally:
            os.close(descriptor)
        self.opened = True

    def task(self, job: WriteJob, journal: Journal) -> WriteTask:
        """What a worker has to know to write the tensors of `job`."""
        places = {name: self.layout.entries[name] for name in job.outputs}
        before = journal.digests.get(job.key) if self.known else None
        return WriteTask(job, partial(self.path), places, before)


def _write_batch(
    jobs: Sequence[WriteJob],
    shards: Mapping[str, _Shard],
    pool: WorkerPool,
    journal: Journal,
    unfit: dict[str, str],
    progress: Progress,
) -> None:
    """Write the tensors of all jobs; those that cannot be quantized are noted in `unfit`."""
    for job in jobs:
        shards[job.file].open()
    begun: dict[Future[Written], WriteJob] = {}
    try:
        for job in jobs:
            future = pool.run(
                functools.partial(shards[job.file].task(job, journal).run, pool.flags),
                functools.partial(progress.begin, job.key),
                functools.partial(_note, job, journal),
            )
            begun[future] = job
        for future in as_completed(begun):
            job = begun[future]
            try:
                future.result()
            except UnfitError as error:
                unfit[job.key] = str(error)
            progress.advance(job.nbytes)
            shards[job.file].missing -= len(job.outputs)
    finally:  # also when interrupted: nothing may run on once the run has ended
        pool.abandon(begun)


def _note(job: WriteJob, journal: Journal, written: Written) -> None:
    """Record a tensor whose bytes are written, unless they were there and recorded before."""
    if written.report is not None:
        journal.add(job.key, written.sha256, written.report)


def _publish_full(shards: Iterable[_Shard], journal: Journal) -> None:
    """Give the files that have all their tensors their names."""
    for shard in shards:
        if shard.opened and not shard.published and not shard.missing:
            journal.sync()
            publish(shard.path)
            shard.published = True
