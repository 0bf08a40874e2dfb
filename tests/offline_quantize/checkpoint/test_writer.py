"""Output appears whole or not at all, where it may, and whatever fails meanwhile."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from killed_runs import Recorder, run
from safetensors.torch import load_file, save_file

from offline_quantize import verify_checkpoint
from offline_quantize.checkpoint.atomic_files import partial, write_json
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.quantize import quantize
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import FormatError, OutputError, SourceError


def test_jobs_do_not_change_a_byte(source, tmp_path, contents, expected):
    for jobs in (2, 4, 16):
        run(source, tmp_path / str(jobs), jobs=jobs)
        assert contents(tmp_path / str(jobs)) == expected


def test_directories_that_are_not_ours(source, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"full: exists and is not empty; give a new"):
            run(source, full, resume=resume)
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match=r"thesis\.tex: is a file; give another output"):
        run(source, full / "thesis.tex")
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"):
        run(source, full / "thesis.tex" / "below")


@pytest.mark.parametrize("name", [".", "inside", "a/deep/one", "../source/inside"])
def test_the_source_is_never_written_to(source, contents, name):
    before = contents(source)
    with pytest.raises(OutputError, match=rf": lies in the source; .* outside of {source}"):
        run(source, source / name)
    assert contents(source) == before


def test_a_link_to_the_source_is_the_source(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match=r"link: lies in the source"):
        run(source, tmp_path / "link")


def test_an_empty_directory_is_welcome(source, tmp_path, contents, expected):
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    assert contents(tmp_path / "empty") == expected


def test_too_little_disk(source, tmp_path, monkeypatch):
    class Usage:
        free = 64 << 20

    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage)
    text = r"new: 0\.07 GB are needed and 0\.07 GB are free; make room or choose another disk"
    with pytest.raises(OutputError, match=text):
        run(source, tmp_path / "some" / "new")
    assert asked == [tmp_path]
    assert not (tmp_path / "some").exists()
    Usage.free = (64 << 20) + make_plan(open_checkpoint(source), Options("rtn-4")).output_bytes
    run(source, tmp_path / "some" / "new")


def test_what_is_there_already_counts_as_free(unfinished, source, monkeypatch):
    class Usage:
        free = (64 << 20) + 70_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    needed = make_plan(open_checkpoint(source), Options("rtn-4")).output_bytes
    assert needed > 70_000
    run(source, unfinished, resume=True)


@pytest.mark.parametrize(("call", "count"), [("pwrite", 9), ("truncate", 1), ("fsync", 3)])
def test_a_disk_that_fails_is_one_sentence_and_can_go_on(
    source, tmp_path, monkeypatch, contents, expected, call, count
):
    target = tmp_path / "target"
    real, left = getattr(os, call), [count]

    def fails(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, fails)
    text = r"cannot be written \(No space left on device\); put that right and run the same"
    with pytest.raises(OutputError, match=text):
        run(source, target, jobs=2)
    monkeypatch.setattr(os, call, real)
    run(source, target, resume=True)
    assert contents(target) == expected


def test_a_source_that_cannot_be_read_for_a_while(
    source, tmp_path, monkeypatch, contents, expected
):
    target = tmp_path / "target"
    name = "model-00002-of-00002.safetensors"
    real = Path.open

    def fails(path, *arguments, **options):
        if path == source / name:
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    plan = make_plan(open_checkpoint(source), Options("rtn-4"))
    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(SourceError, match=rf"{name}: cannot be read \(Input/output error\)"):
        quantize(plan, target, NullProgress())
    monkeypatch.setattr(Path, "open", real)
    run(source, target, resume=True)
    assert contents(target) == expected


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize(("value", "text"), [("nan", "nan"), ("inf", "inf"), ("-inf", "-inf")])
def test_unfit_weights_leave_nothing_behind(checkpoint, weights, tmp_path, jobs, value, text):
    tensors = weights().llama()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][7, 11] = float(value)
    source = checkpoint(tensors=tensors, shards=2)
    where = (
        rf"model-00002-of-00002\.safetensors: tensor '{name}': weight \[7, 11\] is {text}; .*--k"
    )
    with pytest.raises(SourceError, match=where):
        run(source, tmp_path / "target", jobs=jobs)
    assert not (tmp_path / "target").exists()
    run(source, tmp_path / "target", keep=[r"layers\.1\.mlp\.(up|gate)_proj"])


def test_the_first_of_several_faults_is_told(checkpoint, weights, tmp_path):
    tensors = weights().llama()
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            tensors[name][0, 0] = float("nan")
    source = checkpoint(tensors=tensors)
    with pytest.raises(SourceError) as first:
        run(source, tmp_path / "target", jobs=1)
    assert "tensor 'model.layers.0." in str(first.value)


def test_unfit_packed_tensors_leave_nothing_behind(source, tmp_path):
    packed = tmp_path / "packed"
    run(source, packed)
    shard = packed / "model-00002-of-00002.safetensors"
    files = open_packed(packed).files.shards[shard.name]
    entry = next(entry for name, entry in files.items() if name.endswith(".scales"))
    data = bytearray(shard.read_bytes())
    data[entry.begin : entry.begin + 2] = b"\xff\xff"
    shard.write_bytes(data)
    manifest = read_manifest(packed).to_json()  # as if it had been written so
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(data).hexdigest()
    write_json(packed / "precalib.json", manifest)
    with pytest.raises(FormatError, match=r"scales' holds a value that is not finite"):
        dequantize(packed, tmp_path / "out", torch.bfloat16, 2, NullProgress())
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_byte(source, tmp_path):
    progress = Recorder()
    run(source, tmp_path / "target", progress=progress)
    plan = make_plan(open_checkpoint(source), Options("rtn-4"))
    config = len(plan.files.metadata_files["config.json"])
    assert progress.done == plan.source.nbytes + plan.output_bytes - config


def test_partial_names():
    assert partial(Path("a/b.json")) == Path("a/b.json.partial")


def test_a_file_without_tensors_is_written_too(checkpoint, tmp_path):
    source = checkpoint()
    save_file({}, source / "extra.safetensors", metadata={"format": "pt"})
    (source / "model.safetensors").rename(source / "weights.safetensors")  # both are found then
    run(source, tmp_path / "packed")
    assert load_file(tmp_path / "packed" / "extra.safetensors") == {}
    assert verify_checkpoint(tmp_path / "packed", against=source) == []
