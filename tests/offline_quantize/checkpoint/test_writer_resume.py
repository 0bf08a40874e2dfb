"""Which runs may go on in a folder: the same job on the same source, one process at a time."""

import errno
import fcntl
import os
import stat

import pytest
import torch
from killed_runs import Killed, run

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL
from offline_quantize.cli.console import NullProgress
from offline_quantize.commands.dequantize import dequantize
from precalib_kernels.errors import OutputError


def test_a_run_needs_resume_to_go_on(unfinished, source):
    with pytest.raises(OutputError, match=r"target: holds an unfinished run; add --resume"):
        run(source, unfinished)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"recipe": "rtn-3"}, r"recipe' \(\"rtn-4\" instead of \"rtn-3\"\)"),
        ({"changes": {"group_size": 64}}, r"recipe' \(\"rtn-4\" instead of .*--group-size 64"),
        ({"keep": ["o_proj"]}, r"keep' \(\[\] instead of \[\"o_proj\"\]\)"),
        ({"overrides": [("mlp", "rtn-3")]}, r"overrides' "),
    ],
)
def test_another_recipe_or_option_is_refused_with_its_name(unfinished, source, options, key):
    with pytest.raises(OutputError, match=rf"^{unfinished}: the run there has another '{key}"):
        run(source, unfinished, resume=True, **options)


def test_another_source_is_refused(unfinished, source, edit_json, checkpoint, weights):
    name = "model-00001-of-00002.safetensors"
    os.utime(source / name, ns=(1, 1))
    with pytest.raises(OutputError, match=rf"another 'source: {name}: modified' \(.* instead of 1"):
        run(source, unfinished, resume=True)
    other = checkpoint("other", weights().llama(1), shards=2)
    with pytest.raises(OutputError, match=r"the run there has another 'source: "):
        run(other, unfinished, resume=True)
    edit_json(source / "config.json", lambda config: config.update(vocab_size=9))
    with pytest.raises(OutputError, match=r"another 'source: config\.json'"):
        run(source, unfinished, resume=True)


def test_a_damaged_job_file_is_refused(unfinished, source):
    (unfinished / JOB).write_text("{")
    with pytest.raises(OutputError, match=rf"{JOB}: not valid JSON .*; remove the directory"):
        run(source, unfinished, resume=True)


def test_a_finished_run_is_left_alone_and_compared(source, tmp_path, contents):
    target = tmp_path / "target"
    assert run(source, target, resume=True).seconds is not None
    before = contents(target)
    again = run(source, target, resume=True)
    assert again.seconds is None
    assert contents(target) == before
    with pytest.raises(OutputError, match=r"has another 'recipe'"):
        run(source, target, resume=True, recipe="rtn-3")
    with pytest.raises(OutputError, match=r"target: exists and is not empty"):
        run(source, target)


def test_a_finished_run_with_another_source(source, tmp_path, checkpoint):
    run(source, tmp_path / "target")
    with pytest.raises(OutputError, match=r"has another 'source: "):
        run(checkpoint("other"), tmp_path / "target", resume=True)
    moved = source.rename(tmp_path / "moved")
    os.utime(moved / "model-00001-of-00002.safetensors", ns=(1, 1))
    assert run(moved, tmp_path / "target", resume=True).seconds is None


def test_two_processes_do_not_write_at_once(unfinished, source, contents, expected):
    descriptor = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match=r"another process is writing there; wait for it"):
        run(source, unfinished, resume=True)
    os.close(descriptor)
    run(source, unfinished, resume=True)
    assert contents(unfinished) == expected


def test_the_journal_is_locked_where_directories_cannot_be(
    unfinished, source, contents, expected, monkeypatch
):
    """As on NFS, where several machines see the same files."""
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = (unfinished / JOURNAL).read_bytes()
    with (unfinished / JOURNAL).open("ab") as held:
        flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"another process is writing there; wait for it"):
            run(source, unfinished, resume=True)
    assert (unfinished / JOURNAL).read_bytes() == before
    run(source, unfinished, resume=True)
    assert contents(unfinished) == expected


def test_another_run_of_dequantize_is_refused(source, tmp_path, disk):
    packed, target = tmp_path / "packed", tmp_path / "target"
    run(source, packed)
    disk.kill_at(20)
    with pytest.raises(Killed):
        dequantize(packed, target, torch.bfloat16, 1, NullProgress())
    disk.live()
    with pytest.raises(OutputError, match=r"has another 'dtype' \(\"torch.bfloat16\" instead of"):
        dequantize(packed, target, torch.float16, 1, NullProgress())
    with pytest.raises(OutputError, match=r"has another 'dequantize'"):
        run(source, target, resume=True)
    run(source, tmp_path / "other")
    with pytest.raises(OutputError, match=r"other: exists and is not empty"):
        dequantize(packed, tmp_path / "other", torch.bfloat16, 1, NullProgress())
