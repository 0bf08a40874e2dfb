"""Packed weights for the tests of the compiled kernels."""

import dataclasses

import pytest
import torch
from x86_cases import Case

from precalib_kernels.format import reference


@pytest.fixture
def make_case(make_packed):
    def make(layout, columns=416, shards=(37, 16, 1), edit=None):
        made = [
            make_packed(layout, rows, columns, seed).tensors for seed, rows in enumerate(shards)
        ]
        for tensors in made:
            if edit:
                edit(tensors)
        plain = dataclasses.replace(layout, column_scale=False)
        base, scale = [], []
        for rows, tensors in zip(shards, made, strict=True):
            base.append(reference.dequantize(tensors, plain, columns))
            ones = torch.ones(1, columns)
            scale.append(tensors.get("column_scale", ones).float().expand(rows, columns))
        fused = {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
        return Case(
            layout, columns, shards, fused, torch.cat(base).double(), torch.cat(scale).double()
        )

    return make
