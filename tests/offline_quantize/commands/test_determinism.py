"""What changes no byte of a packed checkpoint. docs/determinism.md lists all of it."""

import os
import subprocess
import sys

import pytest
import torch

RUN = "from offline_quantize.cli.main import main; main()"


def test_threads_of_torch_change_no_byte(checkpoint, quantize, contents):
    source, found = checkpoint(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(contents(quantize(source, "--jobs", 1, target=f"{threads}")))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_two_processes_write_the_same(byte_llama, tmp_path, contents):
    """Each with its own order of hashes, with inputs from random tokens."""
    source = byte_llama(hidden_size=128, intermediate_size=160)
    found = []
    for seed in ("1", "2"):
        target = tmp_path / seed
        command = [
            sys.executable,
            "-c",
            RUN,
            "quantize",
            source,
            target,
            "--activation-tokens",
            "64",
        ]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        found.append(contents(target))
    assert found[0] == found[1]
