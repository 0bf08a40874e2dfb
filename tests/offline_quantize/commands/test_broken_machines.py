"""A full disk, too little memory, a clock that jumps, a check that is broken off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FULL_DISK = Path(__file__).parents[2] / "helpers" / "full_disk.py"
NO_MOUNT = 77

# With the limit in MiB, once all is imported: what a machine has left, not what Python needs.
LIMITED = """
import resource, sys
from offline_quantize.cli import main as cli
from offline_quantize.method import feedback, trellis
more = int(sys.argv[1]) << 20
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
sys.argv = ["precalib", *sys.argv[2:]]
resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))
cli.main()
"""


@pytest.fixture
def source(checkpoint, weights):
    return checkpoint(tensors=weights().llama(1), shards=2)


def on_a_full_disk(folder, left, *command):
    folder.mkdir()
    words = [sys.executable, FULL_DISK, folder, str(left), *map(str, command)]
    ran = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if ran.returncode == NO_MOUNT:
        pytest.skip("this machine allows no mounts")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_full_and_then_written(ran, expected):
    assert ran["first"]["code"] == 1
    assert "cannot be written (No space left on device)" in ran["first"]["said"]
    assert ran["first"]["said"].count("\n") == 1
    assert "config.json" not in ran["between"]
    assert ran["second"] == {"code": 0, "said": ""}
    assert ran["files"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 12_288, 98_304])
def test_a_disk_that_fills_up_while_quantizing(source, quantize, contents, tmp_path, left):
    expected = contents(quantize(source, "--recipe", "rtn-4", target="whole"))
    disk = tmp_path / "disk"
    options = ("--recipe", "rtn-4", "--jobs", 1)
    ran = on_a_full_disk(disk, left, "quantize", source, disk / "target", *options)
    assert_full_and_then_written(ran, expected)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_dequantizing(source, quantize, precalib, contents, tmp_path):
    packed = quantize(source, "--recipe", "rtn-4", target="packed")
    assert precalib("dequantize", packed, tmp_path / "whole").code == 0
    disk = tmp_path / "disk"
    ran = on_a_full_disk(disk, 98_304, "dequantize", packed, disk / "target")
    assert_full_and_then_written(ran, contents(tmp_path / "whole"))


@pytest.mark.slow
def test_a_limit_of_memory(checkpoint, weights, quantize, contents, tmp_path):
    """However little there is: a sentence, no crash of native code, and the run can go on."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": weights()(1024, 2048) for i in range(2)}
    source = checkpoint(tensors=tensors)
    expected = contents(quantize(source, target="whole"))
    refused = 0
    for limit in (1, 12, 40, 90, 2000):
        target = tmp_path / f"limit-{limit}"
        command = [sys.executable, "-c", LIMITED, str(limit), "quantize", source, target]
        ran = subprocess.run(
            list(map(str, [*command, "--activations", "none", "--jobs", 1])),
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            refused += 1
            assert ran.returncode == 1, ran.stderr
            assert ran.stderr.endswith(
                "the memory is not enough; use fewer --jobs, or a machine with more\n"
            )
            assert ran.stderr.count("\n") == 1
            quantize(source, *(["--resume"] if target.exists() else []), target=target.name)
        assert contents(target) == expected
    assert 1 < refused < 5


# The search of groups as large as the format allows takes 20 MB, of which there are 4.
SEARCH = """
import resource, torch
from offline_quantize.method import trellis
from offline_quantize.method.recipes import RECIPES
groups = torch.ones(1, 32768), torch.ones(1, 1), torch.full((1, 32768), 2, dtype=torch.uint8)
arguments = (*groups, RECIPES["balanced-4"].layout, trellis._native())
trellis.search_native(*arguments)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 20),) * 2)
try:
    trellis.search_native(*arguments)
except MemoryError as error:
    print("no memory", error)
"""


@pytest.mark.slow
def test_compiled_code_without_memory_does_not_end_the_process():
    ran = subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "no memory for the trellis search\n"), ran.stderr


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps(source, quantize, contents, monkeypatch, tmp_path, jump):
    """Neither the journal nor what is unfinished goes by the time of day."""
    expected = contents(quantize(source, "--recipe", "rtn-4", target="whole"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    target = quantize(source, "--recipe", "rtn-4", target="jumped")
    assert contents(target) == expected
    for path in (target, *target.iterdir()):  # written in the past or in the future
        os.utime(path, (now() + jump, now() + jump))
    quantize(source, "--recipe", "rtn-4", "--resume", target="jumped")
    assert contents(target) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_verify_that_is_broken_off_changes_nothing(
    checkpoint, quantize, precalib, contents, kill
):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(8192, 4096) * 0.02}
    source = checkpoint(tensors=tensors)
    packed = quantize(source, "--recipe", "rtn-4", target="packed")
    before = contents(packed)
    run = (
        "import sys; from offline_quantize.cli import main as cli; print(1, flush=True); cli.main()"
    )
    command = [sys.executable, "-c", run, "verify", packed, "--against", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(kill)
        said = process.communicate()[1].decode()
    assert process.returncode
    assert "Traceback" not in said
    assert contents(packed) == before
    assert precalib("verify", packed, "--against", source).code == 0
