"""Output goes on from wherever it was killed; all steps are tried. See `killed_runs.py`."""

import os
import random
import shutil

import pytest
import torch
from killed_runs import Killed, Recorder, journaled, run, run_to_death

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.cli.console import NullProgress
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.verify import verify
from precalib_kernels.errors import PrecalibError, UnfitError


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_step_and_resumed(disk, source, tmp_path, contents, torn):
    whole = tmp_path / "whole"
    run(source, whole)
    expected = contents(whole)
    assert not {JOB, JOURNAL} & expected.keys()
    last = 0
    while True:
        last += 1
        target = tmp_path / f"killed-{last}"
        if not run_to_death(disk, last, torn, source, target):
            break
        if (target / "config.json").exists() and not (target / JOB).exists():
            assert list(verify(target, source, NullProgress())) == []
        else:
            with pytest.raises(PrecalibError):
                open_packed(target)
        run(source, target, resume=True)
        assert contents(target) == expected, f"killed at step {last}"
        shutil.rmtree(target)
    assert last > 60


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 4])
def test_killed_again_and_again(disk, source, tmp_path, contents, jobs):
    run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    chance = random.Random(jobs)
    for case in range(8):
        target = tmp_path / str(case)
        resume = False
        while run_to_death(disk, chance.randint(1, 70), True, source, target, resume, jobs):
            resume = True
        run(source, target, resume=True, jobs=jobs)
        assert contents(target) == expected


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_dequantize_killed_at_every_step_just_goes_on(disk, source, tmp_path, contents, torn):
    packed, whole = tmp_path / "packed", tmp_path / "whole"
    run(source, packed)
    dequantize(packed, whole, torch.bfloat16, 1, NullProgress())
    expected = contents(whole)
    killed, last = True, 0
    while killed:
        last += 1
        target = tmp_path / f"killed-{last}"
        killed = False
        disk.kill_at(last, torn)
        try:
            dequantize(packed, target, torch.bfloat16, 1, NullProgress())
        except Killed:
            killed = True
        disk.live()
        if killed:
            finished = (target / "config.json").exists() and not (target / JOB).exists()
            if not finished:
                dequantize(packed, target, torch.bfloat16, 2, NullProgress())
            assert contents(target) == expected, f"killed at step {last}"
            shutil.rmtree(target)
    assert last > 30


def test_finished_tensors_are_not_computed_again(unfinished, source, monkeypatch, expected):
    from offline_quantize.commands import quantize as module

    names = []
    encode = module.encode
    monkeypatch.setattr(
        module,
        "encode",
        lambda weight, recipe, where, _: names.append(where) or encode(weight, recipe, where),
    )
    before = journaled(unfinished)
    run(source, unfinished, resume=True)
    assert 0 < len(names) < 5
    assert not any(name in where for name in before for where in names)


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 9, 200, -1])
@pytest.mark.parametrize("kind", ["*.safetensors", "*.partial"])
def test_bytes_that_changed_meanwhile_are_made_again(
    unfinished, source, contents, expected, kind, where
):
    path = sorted(unfinished.glob(kind))[0]
    data = bytearray(path.read_bytes())
    data[where] ^= 255
    path.write_bytes(data)
    run(source, unfinished, resume=True)
    assert contents(unfinished) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda target: (target / JOURNAL).unlink(),
        lambda target: (target / JOURNAL).write_bytes(b"\xff\x00garbage\n"),
        lambda target: (target / JOURNAL).write_bytes((target / JOURNAL).read_bytes()[:-9]),
        lambda target: (target / JOURNAL).write_bytes((target / JOURNAL).read_bytes()[:-1]),
        lambda target: (target / JOURNAL).write_bytes(
            b'{"tensor": [], "sha256": 1, "report": 2}\n' + (target / JOURNAL).read_bytes()
        ),
        lambda target: (target / JOURNAL).write_bytes(
            b"[" * 100_000 + b"\n" + (target / JOURNAL).read_bytes()
        ),
        lambda target: sorted(target.glob("*.safetensors"))[0].unlink(),
        lambda target: os.truncate(sorted(target.glob("*.partial"))[0], 100),
        lambda target: os.truncate(sorted(target.glob("*.partial"))[0], 10**6),
    ],
)
def test_lost_and_torn_work_is_done_again(unfinished, source, contents, expected, change):
    change(unfinished)
    run(source, unfinished, resume=True, jobs=2)
    assert contents(unfinished) == expected


def test_an_interrupt_stops_at_once_and_can_go_on(source, tmp_path, contents, expected):
    class Interrupting(Recorder):
        def advance(self, nbytes):
            super().advance(nbytes)
            if self.done > 60_000:
                raise KeyboardInterrupt

    target, progress = tmp_path / "target", Interrupting()
    with pytest.raises(KeyboardInterrupt):
        run(source, target, jobs=2, progress=progress)
    assert 2 < len((target / JOURNAL).read_bytes().splitlines()) < 10
    assert not (target / "config.json").exists()
    run(source, target, resume=True)
    assert contents(target) == expected


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupted_run_with_unfit_weights_fails_when_resumed(
    checkpoint, weights, tmp_path, monkeypatch, jobs
):
    tensors = weights().llama()
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1e-15
    source, target = checkpoint(tensors=tensors, shards=2), tmp_path / "target"

    class Interrupting(NullProgress):
        def begin(self, name):
            if name == "model.layers.1.input_layernorm.weight":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, target, jobs=jobs, progress=Interrupting())
    assert (target / JOB).exists()
    assert not list(target.glob("*.safetensors"))  # nothing that looks finished
    with pytest.raises(UnfitError, match="2 tensors cannot be quantized") as found:
        run(source, target, jobs=jobs, resume=True)
    assert set(found.value.faults) == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}
    assert not target.exists()
