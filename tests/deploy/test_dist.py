"""Two builds give the same bytes; the lock file and the bill of materials name every package."""

import json
import os
import re
import shutil
import time
import tomllib
from pathlib import Path

import dist
import pytest
import sbom

from offline_quantize.method.trellis import SOURCE
from precalib_kernels.toolchain import compile as build

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "offline_quantize", "vllm_precalib", "pyproject.toml", "setup.py")


@pytest.fixture
def source(tmp_path):
    """Copies the sources to a folder, under other times and permissions every time."""

    def copy(name, umask):
        folder, before = tmp_path / name, os.umask(umask)
        folder.mkdir()
        for part in (*PARTS, "README.md", "LICENSE"):
            if (ROOT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / part, folder / part, ignore=ignored)
            else:
                shutil.copyfile(ROOT / part, folder / part)
        os.umask(before)
        return folder

    return copy


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_two_builds_are_equal(source, tmp_path, monkeypatch, compiled):
    compiler = tmp_path / "compiler"  # writes an empty file; real ones are tested below
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler) if compiled else "")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = []
    for name, umask in (("one", 0o022), ("two", 0o002)):
        out = tmp_path / f"{name}-out"
        out.mkdir()
        made = dist.build(source(name, umask), out, 1_700_000_000)
        found.append({path.name: path.read_bytes() for path in made})
        time.sleep(1.1)  # the archives count seconds
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert found[0][name] == found[1][name], name
    assert any("-any.whl" in name for name in found[0]) != compiled


@pytest.mark.slow
def test_two_compilations_are_equal(tmp_path):
    made = []
    for name in ("a", "another/folder"):
        path = tmp_path / name / "x.so"
        build.compile_library(build.definition(SOURCE), path)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_the_lock_file_has_a_hash_for_every_pin():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = sbom.locked((ROOT / "deploy" / "constraints.lock").read_text())

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    versions = {plain(name): version for name, (version, _) in locked.items()}
    assert versions == {plain(name): version for name, version in pins.items()}
    assert all(digests for _, digests in locked.values())


def test_the_bill_of_materials_names_every_package():
    text = (ROOT / "deploy" / "constraints.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bill = sbom.sbom(text, project)
    assert bill == json.loads(json.dumps(sbom.sbom(text, project)))
    assert {part["name"] for part in bill["components"]} == sbom.locked(text).keys()
    assert len({part["bom-ref"] for part in bill["components"]}) == len(bill["components"])
    (torch,) = [part for part in bill["components"] if part["name"] == "torch"]
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version'].replace('+', '%2B')}"
    assert all(part["externalReferences"][0]["hashes"] for part in bill["components"])
    assert bill["metadata"]["component"]["version"] == project["version"]
