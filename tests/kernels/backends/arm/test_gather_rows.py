"""Rows of packed weights by number, as Arm's memory layout has them."""

import os
import subprocess

import arm_emulator
import pytest
import torch
from arm_cases import LAYOUTS

from precalib_kernels.backends.x86 import library


@pytest.fixture(scope="module")
def gather(tools, tmp_path_factory):
    """Rows of a case, float32, by a program for Arm."""
    work = tmp_path_factory.mktemp("gather")
    sources = arm_emulator.HERE / "run_gather_rows.cpp", library.SOURCES / "gather_rows.cpp"
    command = [tools.compiler, "-O2", "-std=c++20", "-fopenmp", *sources, "-o", work / "program"]
    subprocess.run(command, check=True)

    def run(case, ids):
        parts = [case.memory.to_bytes(), bytes(case.packed.numpy()), bytes(ids.numpy())]
        sizes = torch.tensor([len(part) for part in parts])
        (work / "problem").write_bytes(bytes(sizes.numpy()) + b"".join(parts))
        files = work / "program", work / "problem", work / "result"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*tools.emulator, *files], check=True, env=environment)
        found = torch.frombuffer(bytearray((work / "result").read_bytes()), dtype=torch.float32)
        return found.view(len(ids), -1)

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_the_reference(make_case, gather, name):
    case = make_case(LAYOUTS[name], columns=1056 if name == "far positions" else 416)
    ids = torch.randperm(54, generator=torch.Generator().manual_seed(2))
    expected = torch.cat([b * s for b, s in zip(case.base, case.scale, strict=True)])[ids]
    bound = 2.0**-24 * (6 * expected.abs() + 3 * expected.abs().amax(1, keepdim=True))
    assert bool(((gather(case, ids).double() - expected).abs() <= bound).all())
