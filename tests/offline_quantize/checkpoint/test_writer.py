"""Output appears whole or not at all, and goes on from wherever it was killed.

A kill is simulated by an exception at the n-th call that changes the disk, after which every such
call raises, so that no clean-up can help; write calls may die half-way. All n are tried.
"""

import fcntl
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL, partial
from offline_quantize.checkpoint.journal import Journal
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.quantize import quantize
from offline_quantize.commands.verify import verify
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import FormatError, OutputError, PrecalibError, SourceError, UnfitError


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


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def source(checkpoint, weights):
    files = {"tokenizer.json": b"{}", "a/b/c.txt": b"text", "empty.txt": b""}
    return checkpoint(tensors=weights().llama(1), shards=2, files=files)


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


def journaled(target):
    return [json.loads(line)["tensor"] for line in (target / JOURNAL).read_bytes().splitlines()]


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


class Recorder(NullProgress):
    """What was computed; a resumed run skips the rest."""

    def __init__(self):
        self.done = 0

    def advance(self, nbytes):
        self.done += nbytes


def test_finished_tensors_are_not_computed_again(unfinished, source, monkeypatch, expected):
    from offline_quantize.commands import quantize as module

    names = []
    encode = module.encode
    monkeypatch.setattr(
        module,
        "encode",
        lambda weight, recipe, where: names.append(where) or encode(weight, recipe, where),
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
    with pytest.raises(FormatError, match=r"scales' holds a value that is not finite"):
        dequantize(packed, tmp_path / "out", torch.bfloat16, 2, NullProgress())
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_at_once(unfinished, source, contents, expected):
    descriptor = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match=r"another process is writing there; wait for it"):
        run(source, unfinished, resume=True)
    os.close(descriptor)
    run(source, unfinished, resume=True)
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


def test_progress_counts_every_byte(source, tmp_path):
    progress = Recorder()
    run(source, tmp_path / "target", progress=progress)
    plan = make_plan(open_checkpoint(source), Options("rtn-4"))
    config = len(plan.files.metadata_files["config.json"])
    assert progress.done == plan.source.nbytes + plan.output_bytes - config


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


def test_partial_names():
    assert partial(Path("a/b.json")) == Path("a/b.json.partial")


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
