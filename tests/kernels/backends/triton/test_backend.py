"""When the Triton backend is taken; what it computes is tested by `interpreted_suite.py`."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton import backend, op
from precalib_kernels.backends.triton.backend import TritonBackend, WarmUps, warm_up
from precalib_kernels.backends.triton.launch_configs import TABLE

SPEC = LinearSpec(RECIPE_LAYOUTS["balanced-4"], 4096, (4096,), torch.bfloat16, "cuda")


@pytest.fixture
def gpu(monkeypatch):
    """This machine has a GPU of that compute capability, None for one of AMD."""

    def pretend(capability=(9, 0), flushes=False):
        monkeypatch.setattr(backend, "has_triton", lambda: True)
        monkeypatch.setattr(backend, "compute_capability", lambda: capability)
        monkeypatch.setattr(backend, "flushes_subnormals", lambda: flushes)

    pretend()
    return pretend


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0), None])
def test_it_runs_on_gpus(gpu, capability):
    gpu(capability)
    assert TritonBackend.can_run(SPEC) is None


def test_it_needs_asynchronous_copies(gpu):
    gpu((7, 5))
    assert TritonBackend.can_run(SPEC) == "needs compute capability 8.0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "computes on GPUs, not on cpu"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        (
            {"layout": dataclasses.replace(SPEC.layout, group_size=256)},
            "no kernel for groups of 256",
        ),
    ],
)
def test_it_says_why_not(gpu, change, reason):
    assert reason in TritonBackend.can_run(dataclasses.replace(SPEC, **change))


def test_it_computes_experts_and_looks_rows_up(gpu):
    assert TritonBackend.can_run(dataclasses.replace(SPEC, experts=8)) is None
    assert TritonBackend.can_run(dataclasses.replace(SPEC, embedding=True)) is None
    fused = dataclasses.replace(SPEC, embedding=True, shard_sizes=(64, 64))
    assert TritonBackend.can_run(fused) == "looks up rows of one matrix, not of 2 fused ones"


def test_blocks_of_routes_are_those_of_the_table():
    limits = tuple(TABLE[op.family()])
    chosen = TritonBackend(dataclasses.replace(SPEC, experts=8))
    assert chosen.row_limits() == limits
    for most, blocks in TABLE[op.family()].items():
        assert chosen.route_block(most) == blocks.block_m
    assert chosen.route_block(10**6) == blocks.block_m


def test_subnormal_numbers_need_matrix_units_that_take_them(gpu):
    gpu(None, flushes=True)
    placed = dataclasses.replace(SPEC, layout=RECIPE_LAYOUTS["paper-4"])
    assert "MI200" in TritonBackend.can_run(placed)
    assert TritonBackend.can_run(SPEC) is None


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert TritonBackend.can_run(SPEC) == "Triton is not installed or has no driver"


def driver(active):
    return SimpleNamespace(driver=SimpleNamespace(is_active=lambda: active))


@pytest.mark.parametrize(
    ("drivers", "visible", "there"),
    [
        ({"nvidia": driver(True), "amd": driver(False)}, None, True),
        ({"nvidia": driver(False), "amd": driver(False)}, None, False),
        ({"nvidia": driver(True), "amd": driver(True)}, "0", False),
        ({"nvidia": driver(True), "cpu": driver(True)}, "0", True),
        ({"nvidia": driver(False)}, "", True),
        ({"nvidia": driver(False)}, "0", False),
        ({}, None, False),
    ],
)
def test_triton_needs_one_driver_unless_all_gpus_are_hidden(monkeypatch, drivers, visible, there):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.backends", SimpleNamespace(backends=drivers))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert backend.has_triton.__wrapped__() == there


def test_triton_may_not_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.backends", None)
    assert backend.has_triton.__wrapped__() is False


def test_kinds_of_layers_are_warmed_up_once(monkeypatch):
    runs = []
    monkeypatch.setattr(backend.op, "gpu_linear", lambda x, *_: runs.append(len(x)))
    spec = dataclasses.replace(SPEC, input_size=32, shard_sizes=(8,))
    warm_ups = WarmUps()
    for _ in range(3):
        warm_up(spec, (torch.zeros(1),), warm_ups)
    assert {1, 9, 17, 33, 65} <= set(runs)
    assert runs == [rows for rows in backend.op.warm_up_rows() for _ in "ab"]
    warm_up(dataclasses.replace(spec, shard_sizes=(16,)), (torch.zeros(1),), warm_ups)
    assert len(runs) == 4 * len(backend.op.warm_up_rows())
