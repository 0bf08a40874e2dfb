"""Disks that fail or are full, sources that change, memory that is short: a sentence, no harm."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from offline_quantize.cli import main as cli
from offline_quantize.commands import quantize as module

RUN = "from offline_quantize.cli.main import main; main()"
SHIM = Path(__file__).parents[2] / "helpers" / "faulty_disk.c"


@pytest.fixture
def source(checkpoint, weights):
    return checkpoint(tensors=weights().llama(1), shards=2)


@pytest.fixture
def whole(source, quantize, contents):
    return contents(quantize(source, "--recipe", "rtn-4", target="whole"))


def start(*arguments, limit=None, **environment):
    """The command in a process of its own.

    limit: (resource, bytes) that it may take.
    """

    def restrict():
        if limit:
            resource.setrlimit(limit[0], (limit[1], limit[1]))

    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=restrict,
    )


def sentence(ran):
    assert ran.returncode == 1, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith("precalib: ")
    return line


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_a_source_that_changes_meanwhile(
    source, quantize, precalib, monkeypatch, tmp_path, change, command
):
    """What was read before and after may not belong together."""
    read, options = source, ["--recipe", "rtn-4"]
    if command == "dequantize":
        read, options = quantize(source, *options, target="packed"), []
    path = read / "model-00001-of-00002.safetensors"
    owner = module if command == "quantize" else sys.modules[f"offline_quantize.commands.{command}"]
    write = owner.write_shards

    def write_and_change(*arguments):
        done = write(*arguments)
        change(path)
        return done

    monkeypatch.setattr(owner, "write_shards", write_and_change)
    text = precalib(command, read, tmp_path / "target", *options).sentence
    assert f"{path}: changed while it was read" in text or f"{path}: went away" in text
    assert not (tmp_path / "target").exists()


def test_another_process_writes_there(source, precalib, tmp_path):
    (tmp_path / "target").mkdir()
    descriptor = os.open(tmp_path / "target", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ran = precalib("quantize", source, tmp_path / "target", "--recipe", "rtn-4")
    assert "another process is writing there" in ran.sentence
    os.close(descriptor)
    assert precalib("quantize", source, tmp_path / "target", "--recipe", "rtn-4").code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] ... can't allocate memory: 9 bytes"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_a_sentence(source, precalib, monkeypatch, tmp_path, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "make_plan", fail)
    ran = precalib("quantize", source, tmp_path / "target")
    assert ran.sentence == (
        "precalib: the memory is not enough; use fewer --jobs, or a machine with more"
    )


def test_other_errors_are_not_taken_for_it(source, precalib, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "make_plan", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        precalib("quantize", source, tmp_path / "target")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", str(SHIM), "-o", str(library)], check=True
    )
    return library


@pytest.mark.slow
def test_short_writes_change_no_byte(source, whole, contents, tmp_path, shim):
    options = ("--recipe", "rtn-4")
    ran = start("quantize", source, tmp_path / "t", *options, LD_PRELOAD=str(shim), FAULT="short")
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "t") == whole


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 9])
def test_a_disk_that_fails_can_be_mended(source, whole, contents, tmp_path, shim, at):
    command = ("quantize", source, tmp_path / "t", "--recipe", "rtn-4")
    ran = start(*command, LD_PRELOAD=str(shim), FAULT="eio", FAULT_AT=str(at))
    assert "cannot be written (Input/output error)" in sentence(ran)
    assert not (tmp_path / "t" / "config.json").exists()
    assert start(*command, "--resume").returncode == 0
    assert contents(tmp_path / "t") == whole


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(source, whole, contents, tmp_path):
    command = ("quantize", source, tmp_path / "t", "--recipe", "rtn-4")
    ran = start(*command, limit=(resource.RLIMIT_FSIZE, 10_000))
    assert "cannot be written (File too large)" in sentence(ran)
    assert start(*command, "--resume").returncode == 0
    assert contents(tmp_path / "t") == whole
