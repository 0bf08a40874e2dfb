"""The emulated library of Arm kernels, and weights for it."""

import dataclasses

import arm_emulator
import pytest
import torch
from arm_cases import ArmCase

from precalib_kernels.backends.arm.memory_layout import ArmLayout, repack
from precalib_kernels.format import reference


@pytest.fixture(scope="session")
def tools():
    found = arm_emulator.tools()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def program(tools, tmp_path_factory):
    return arm_emulator.build_program(tools, tmp_path_factory.mktemp("arm"))


@pytest.fixture
def run(program, tmp_path):
    """Computes problems: results and kernels."""
    return lambda problems, threads=1: program.run(problems, tmp_path, threads)


@pytest.fixture
def make_case(make_packed):
    def make(layout, columns=416, shards=(37, 16, 1), edit=None, int8_inputs=False):
        made = [
            make_packed(layout, rows, columns, seed).tensors for seed, rows in enumerate(shards)
        ]
        for tensors in made:
            if edit:
                edit(tensors)
        plain = dataclasses.replace(layout, column_scale=False)
        base = [reference.dequantize(tensors, plain, columns).double() for tensors in made]
        ones = torch.ones(1, columns)
        scale = [tensors.get("column_scale", ones).double() for tensors in made]
        fused = {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
        memory = ArmLayout(layout, columns, shards, int8_inputs)
        return ArmCase(memory, repack(fused, memory, "here"), base, scale)

    return make
