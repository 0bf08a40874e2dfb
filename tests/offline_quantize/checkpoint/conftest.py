"""A source for runs that are killed, the disk that kills them, and what they should leave."""

import shutil

import pytest
from killed_runs import Disk, journaled, run, run_to_death


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def source(checkpoint, weights):
    files = {"tokenizer.json": b"{}", "a/b/c.txt": b"text", "empty.txt": b""}
    return checkpoint(tensors=weights().llama(1), shards=2, files=files)


@pytest.fixture
def unfinished(disk, source, tmp_path):
    """A run killed in its second shard, the first one being published."""
    target = tmp_path / "target"
    for last in range(20, 100):
        assert run_to_death(disk, last, False, source, target)
        if list(target.glob("*.safetensors")) and len(journaled(target)) == 8:
            return target
        shutil.rmtree(target)
    raise AssertionError


@pytest.fixture
def expected(source, tmp_path, contents):
    run(source, tmp_path / "expected")
    return contents(tmp_path / "expected")
