"""Memory that an encoder frees is used again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from offline_quantize.memory import keep_freed_blocks

def work():
    for size in (18, 19, 19, 19, 19):
        blocks = [torch.ones(1 << size) for _ in range(8)]
        del blocks

def thread():
    work()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    work()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

if sys.argv[1] == "kept":
    keep_freed_blocks()
worker = threading.Thread(target=thread)
worker.start()
worker.join()
"""


@pytest.mark.slow
def test_freed_blocks_are_not_returned_to_the_system():
    """Each page of 4 KiB that was returned is a fault: glibc alone returns most of 72 MiB."""
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, how]))
        for how in ("kept", "returned")
    )
    assert kept < 100
    assert returned > 5000
