"""Runs of `quantize` that die at a chosen step.

A kill is simulated by an exception at the n-th call that changes the disk, after which every such
call raises, so that no clean-up can help; write calls may die half-way.
"""

import json
import os
import threading
from pathlib import Path

import pytest

from offline_quantize.checkpoint.atomic_files import JOURNAL
from offline_quantize.checkpoint.journal import Journal
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.cli.console import NullProgress
from offline_quantize.commands.quantize import quantize
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan


class Killed(BaseException):
    pass


class Disk:
    """Counts the calls that change the disk and dies at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.last, self.torn = 0, 10**9, False
        self.lock = threading.Lock()
        for owner, name, data in (
            (os, "pwrite", 1),
            (os, "truncate", None),
            (os, "fsync", None),
            (Path, "write_bytes", 1),
            (Path, "replace", None),
            (Path, "unlink", None),
            (Path, "mkdir", None),
        ):
            monkeypatch.setattr(owner, name, self.mortal(getattr(owner, name), data))
        monkeypatch.setattr(Journal, "add", self.mortal_journal(Journal.add))

    def step(self) -> bool:
        """Whether this call is the one to die at."""
        with self.lock:
            self.calls += 1
            if self.calls > self.last:
                raise Killed
            return self.calls == self.last

    def mortal(self, call, data):
        def dying(*arguments, **options):
            if self.step():
                if self.torn and data is not None:
                    half = bytes(arguments[data])[: len(arguments[data]) // 2]
                    call(*arguments[:data], half, *arguments[data + 1 :], **options)
                raise Killed
            return call(*arguments, **options)

        return dying

    def mortal_journal(self, add):
        def dying(journal, *arguments):
            if self.step():
                if self.torn:
                    journal._file.write(b'{"tensor": "model.lay')
                    journal._file.flush()
                raise Killed
            add(journal, *arguments)

        return dying

    def kill_at(self, last: int, torn: bool = False) -> None:
        self.calls, self.last, self.torn = 0, last, torn

    def live(self) -> None:
        self.kill_at(10**9)


def run(source, target, resume=False, jobs=1, recipe="rtn-4", progress=None, **options):
    plan = make_plan(open_checkpoint(source), Options(recipe, **options))
    return quantize(plan, target, progress or NullProgress(), jobs, resume=resume)


def run_to_death(disk, last, torn, *arguments, **options):
    """True when the run was killed, false when it ended before."""
    disk.kill_at(last, torn)
    try:
        run(*arguments, **options)
    except Killed:
        return True
    finally:
        disk.live()
    return False


def journaled(target):
    return [json.loads(line)["tensor"] for line in (target / JOURNAL).read_bytes().splitlines()]


class Recorder(NullProgress):
    """What was computed; a resumed run skips the rest."""

    def __init__(self):
        self.done = 0

    def advance(self, nbytes):
        self.done += nbytes
