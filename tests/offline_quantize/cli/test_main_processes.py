"""The command in a process of its own: killed at any moment, and how much memory it takes."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from offline_quantize.cli import main as cli


@pytest.fixture
def server():
    """Starts processes in milliseconds that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["offline_quantize.cli.main"])
    return context


@pytest.fixture
def start(server, monkeypatch):
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["precalib", *map(str, arguments)])
        process = server.Process(target=cli.main)
        process.start()
        return process

    return start


def test_sigkill_at_random_moments(checkpoint, weights, quantize, start, tmp_path, contents):
    make, tensors = weights(), {"model.embed_tokens.weight": weights()(64, 512)}
    for layer in range(12):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = make(512, 512)
    source = checkpoint(tensors=tensors, shards=4, config={})
    options = ["--recipe", "rtn-4"]
    expected = contents(quantize(source, *options, target="whole"))
    begin = time.monotonic()  # of a second run, as the first may compile and import
    assert contents(quantize(source, *options, target="again")) == expected
    usual = time.monotonic() - begin
    chance, killed = random.Random(0), 0
    for case, jobs in enumerate((1, 4, 1)):
        target = tmp_path / f"killed-{case}"
        for resume in [[]] + [["--resume"]] * 4:
            if target.exists():
                resume = ["--resume"]
            process = start("quantize", source, target, *options, "--jobs", jobs, *resume)
            process.join(chance.uniform(0.1, 1.2) * usual)
            os.kill(process.pid, signal.SIGKILL) if process.exitcode is None else None
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL)
            if process.exitcode == 0:  # the machine has become faster
                usual /= 2
        process = start("quantize", source, target, *options, "--jobs", 5 - jobs, "--resume")
        process.join()
        assert process.exitcode == 0
        assert contents(target) == expected
    assert killed > 3


PEAK = """
import resource, sys
from offline_quantize.cli import main as cli
sys.argv = ["precalib", *sys.argv[1:]]
cli.main()
"""


def peak_memory(*arguments):
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-4"])
def test_memory_is_bounded_by_the_largest_tensor(checkpoint, weights, tmp_path, recipe):
    """One file of 400 MB; `large_checkpoint.py` does the same with 8 GB and every recipe."""
    block = weights()(1024, 2048)  # 4 MiB
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": block.clone() for i in range(20)}
    tensors["model.embed_tokens.weight"] = block.repeat(80, 1)
    small = {name: tensors[name] for name in list(tensors)[:1]}
    peaks = {}
    for name, part in (("small", small), ("large", tensors)):
        source = checkpoint(name, part, config={}, files={})
        peaks[name] = peak_memory(
            "quantize", source, tmp_path / f"{name}-out", "--recipe", recipe, "--jobs", 1
        )
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 400e6
    assert peaks["large"] - peaks["small"] < 60e6
