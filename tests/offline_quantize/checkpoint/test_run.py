"""The protocol of a run, without a model: its states, and what each step leaves on disk.

`test_writer_kills.py` kills whole runs at every step; here each step is looked at by itself.
"""

import pytest

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL, MANIFEST, read_json
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.run import OutputFiles, Run, State
from offline_quantize.checkpoint.safetensors_file import lay_out
from precalib_kernels.errors import OutputError

SHARD = "model.safetensors"


@pytest.fixture
def run(tmp_path):
    """A run without a manifest that writes one empty weight file and copies one file."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(b"{}")
    files = OutputFiles(
        shards={SHARD: lay_out({}, {"format": "pt"})},
        sidecar_files={"a/tokenizer.json": source / "tokenizer.json"},
        metadata_files={"index.json": b"[]", "config.json": b"{ }"},
    )
    return Run(tmp_path / "target", source, {"recipe": "rtn-4", "size": 3}, files)


def names(run):
    found = run.target.rglob("*")
    return {path.relative_to(run.target).as_posix() for path in found if path.is_file()}


def test_the_size_is_exact(run):
    assert run.files.nbytes == run.files.shards[SHARD].size + 2 + 2 + 3


def test_asking_for_the_state_writes_nothing(run):
    assert run.state(resume=False) is State.NEW
    assert run.state(resume=True) is State.NEW
    assert not run.target.exists()


def test_from_the_beginning_to_the_end(run):
    with run.begin():
        assert names(run) == {JOB}
        assert read_json(run.target / JOB, OutputError, "") == run.fingerprint
        assert run.state(resume=True) is State.UNFINISHED
        with pytest.raises(OutputError, match="add --resume to continue it"):
            run.state(resume=False)
        (run.target / SHARD).write_bytes(run.files.shards[SHARD].header)
        run.finish(NullProgress())
    assert names(run) == {SHARD, "a/tokenizer.json", "index.json", "config.json"}
    assert sum((run.target / name).stat().st_size for name in names(run)) == run.files.nbytes


def test_a_run_that_died_while_it_cleaned_up_is_finished(run):
    with run.begin():
        (run.target / "config.json").write_bytes(b"{ }")
        (run.target / JOURNAL).write_bytes(b"")
    assert run.state(resume=True) is State.FINISHED
    run.clean_up()
    assert names(run) == {"config.json"}


def test_another_process_is_kept_out(run):
    with run.begin(), pytest.raises(OutputError, match="another process"), run.begin():
        pass


def test_discarding_leaves_what_is_not_its_own(run):
    with run.begin():
        (run.target / f"{SHARD}.partial").write_bytes(b"x")
        (run.target / "notes.txt").write_bytes(b"mine")
        run.discard()
    assert names(run) == {"notes.txt"}
    (run.target / "notes.txt").unlink()
    run.discard()
    assert not run.target.exists()


def test_without_a_manifest_nothing_tells_that_a_run_is_finished(run):
    run.target.mkdir()
    for name in (MANIFEST, "config.json"):
        (run.target / name).write_bytes(b"{}")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run.state(resume=True)
