"""The tables of the CafeQ benchmark, and the pairs it takes."""

import json

import pytest
import torch

from precalib_kernels.errors import SourceError

NAMES = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "vo"]


@pytest.fixture
def cafeq(load):
    return load("cafeq")


@pytest.fixture
def pairs(cafeq, tmp_path):
    weights = {name: torch.randn(32, 32).bfloat16() for name in NAMES}
    return cafeq.Pairs(weights, heads=2, folder=tmp_path, steps=3)


def test_matrices_are_learned_once_and_kept(cafeq, pairs, monkeypatch):
    found = pairs.matrices("expected error, invertible", "balanced-4")
    assert found.keys() == {NAMES[0], NAMES[2]}
    assert {tuple(matrices.shape) for matrices in found.values()} == {(2, 16, 16)}
    facts = json.loads((pairs.folder / "expected error of balanced-3.json").read_text())
    assert facts[NAMES[0]]["invertible"] <= facts[NAMES[0]]["orthogonal"]
    monkeypatch.setattr(cafeq, "learn", None)
    again = pairs.matrices("expected error, invertible", "balanced-3")
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_random_rotations_are_rotations(pairs):
    for matrices in pairs.matrices("random", "rtn-3").values():
        identity = torch.eye(16).expand(2, 16, 16)
        assert torch.allclose(matrices @ matrices.mT, identity, atol=1e-5)


def test_tables(cafeq, tmp_path):
    row = {"recipe": "rtn-3", "variant": "none", "kl": 0.5, "kl_pair": 0.25}
    row |= {
        "product_error": 0.125,
        "product_error_real_inputs": 0.0625,
        "output_error_real_inputs": None,
    }
    (tmp_path / "results.json").write_text(json.dumps({"source": "m", "rows": [row]}))
    facts = {"steps": 9, "before": 3.0, "orthogonal": 2.0, "orthogonal, seconds": 4.0}
    facts |= {"invertible": 1.0, "invertible, seconds": 5.0}
    (tmp_path / "LogSumExp.json").write_text(json.dumps({"a": facts, "b": facts}))
    lines = list(cafeq.tables(tmp_path))
    assert "| `rtn-3`, none | 0.5000 | 0.2500 | 0.1250 | 0.0625 | – |" in lines
    assert "| LogSumExp, orthogonal | 9 | 3.00 → 2.00 | 8 |" in lines
    assert "| LogSumExp, invertible | 9 | 3.00 → 1.00 | 10 |" in lines


def test_tables_of_nothing(cafeq, tmp_path):
    with pytest.raises(SourceError, match="measure first"):
        list(cafeq.tables(tmp_path))
