"""Checkpoints of earlier releases are read to the same weights. Served: test_engines.py."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import open_checkpoint

HERE = Path(__file__).parent
CHECKPOINTS = sorted(path for path in (HERE / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture(params=CHECKPOINTS, ids=lambda path: path.name)
def released(request):
    return request.param


@pytest.fixture
def precalib(monkeypatch, capsys):
    from offline_quantize.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["precalib", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


def test_every_release_is_here():
    changelog = (HERE.parents[1] / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions
    assert {path.name for path in CHECKPOINTS} == set(versions)


def test_its_weights_are_as_they_were(released):
    packed = open_packed(released)
    assert read_manifest(released).precalib == released.name
    expected = json.loads((HERE / "checkpoints" / f"{released.name}.json").read_text())
    assert expected.keys() == packed.config.modules.keys()
    for module, digest in expected.items():
        weight = packed.weight(module).contiguous().numpy()
        assert hashlib.sha256(weight.tobytes()).hexdigest() == digest, module


def test_every_command_takes_it(released, precalib, tmp_path):
    assert "is whole: files, structure and values of " in precalib("verify", released)
    assert f"made by precalib {released.name}." in precalib("inspect", released)
    shown = json.loads(precalib("inspect", released, "--json"))
    assert shown["tensors"].keys() == open_packed(released).config.modules.keys()
    precalib("dequantize", released, tmp_path / "dense", "--dtype", "float32")
    packed, dense = open_packed(released), open_checkpoint(tmp_path / "dense")
    for module in packed.config.modules:
        assert torch.equal(dense.locations[f"{module}.weight"].read(), packed.weight(module))
    precalib("report", released, "--out", tmp_path / "report.html")


def test_it_is_small():
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    assert size < 400_000 * len(CHECKPOINTS)
