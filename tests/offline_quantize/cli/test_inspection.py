"""`precalib inspect`: layers in their order, totals of files, and all of it as JSON."""

import json

import pytest

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.units import natural


@pytest.fixture
def packed(checkpoint, weights, quantize):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": weights()(32, 128) for i in range(12)}
    return quantize(checkpoint(tensors=tensors, config={}), "--recipe", "rtn-4")


def test_layers_are_in_their_order(packed, precalib):
    lines = precalib("inspect", packed).out.splitlines()
    shown = [line.split()[0] for line in lines if "×" in line]
    assert shown[:12] == [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    as_json = json.loads(precalib("inspect", packed, "--json").out)
    assert list(as_json["tensors"]) == shown[:12]


def test_files_are_counted(packed, precalib):
    files = [path for path in packed.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    ran = precalib("inspect", packed)
    assert f"\n{len(files)} files, {total / 1000:.4g} kB in all.\n" in ran.out
    totals = json.loads(precalib("inspect", packed, "--json").out)["totals"]
    assert (totals["files"], totals["file_bytes"]) == (len(files), total)


def test_the_json_is_what_the_manifest_says(packed, precalib):
    ran, manifest = precalib("inspect", packed, "--json"), read_manifest(packed)
    assert (ran.code, ran.err) == (0, "")
    shown, written = json.loads(ran.out), json.loads((packed / "precalib.json").read_text())
    assert shown["tensors"] == written["tensors"]
    assert shown["kept"] == written["kept"]
    assert shown["totals"].items() >= written["totals"].items()
    assert shown["recipe"] == "rtn-4"
    assert shown["precalib"] == manifest.precalib
    assert shown["directory"] == str(packed)


@pytest.mark.parametrize(
    ("before", "after"),
    [("layers.2.x", "layers.10.x"), ("a", "b"), ("a.1", "a.b"), ("2", "10"), ("x", "x.0")],
)
def test_natural_order(before, after):
    assert natural(before) < natural(after)


def test_digits_that_are_no_numbers():
    assert natural("a²b٣") < natural("a²b٤")
