"""When the Triton backend is taken; what it computes is tested in tests/kernels/gpu."""

import dataclasses

import pytest
import torch
from cost_model import LAYOUTS

from precalib_kernels.backends.base import LinearSpec
from vllm_precalib import triton_backend
from vllm_precalib.triton_backend import TritonBackend

SPEC = LinearSpec(LAYOUTS["balanced-4"], 4096, (4096,), torch.bfloat16, "cuda")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(triton_backend, "HAS_TRITON", True)


def test_it_runs_on_gpus(gpu):
    assert TritonBackend.can_run(SPEC) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "computes on GPUs, not on cpu"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        (
            {"layout": dataclasses.replace(LAYOUTS["balanced-4"], group_size=256)},
            "no kernel for groups of 256",
        ),
    ],
)
def test_it_says_why_not(gpu, change, reason):
    assert reason in TritonBackend.can_run(dataclasses.replace(SPEC, **change))


def test_subnormal_numbers_need_matrix_units_that_take_them(gpu, monkeypatch):
    monkeypatch.setattr(triton_backend, "_flushes_subnormals", lambda: True)
    placed = dataclasses.replace(SPEC, layout=LAYOUTS["paper-4"])
    assert "MI200" in TritonBackend.can_run(placed)
    assert TritonBackend.can_run(SPEC) is None


def test_without_triton_there_is_a_reason():
    if not triton_backend.HAS_TRITON:
        assert "no driver" in TritonBackend.can_run(SPEC)


def test_kinds_of_layers_are_warmed_up_once(monkeypatch):
    runs = []
    monkeypatch.setattr(triton_backend.op, "gpu_linear", lambda x, *_: runs.append(len(x)))
    spec = dataclasses.replace(SPEC, input_size=32, shard_sizes=(8,))
    for _ in range(3):
        triton_backend.warm_up(spec, (torch.zeros(1),))
    assert {1, 9, 17, 33, 257} <= set(runs)
    assert runs == [rows for rows in triton_backend.op.warm_up_rows() for _ in "ab"]
