"""What pip makes of the files that a container's build sees, with a compiler and without."""

import email
import platform
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest

from offline_quantize.method import feedback, trellis
from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain import compile as build

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="this processor has no kernels here"
    ),
]


def file_names():
    encoder = (build.definition(module.SOURCE) for module in (trellis, feedback))
    return {made.file_name() for made in (*encoder, library.definition())}


@pytest.fixture
def source(tmp_path):
    """The project, as .dockerignore lets it through."""
    copy = tmp_path / "source"
    copy.mkdir()
    for line in (ROOT / "deploy" / "Dockerfile.cpu.dockerignore").read_text().splitlines():
        path = ROOT / line.removeprefix("!")
        if line.startswith("!") and path.is_dir():
            copytree(path, copy / path.name, ignore=ignore_patterns("__pycache__"))
        elif line.startswith("!"):
            copy2(path, copy)
    return copy


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Writes an empty file wherever it is told to, which is the last of its arguments."""
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def pip_wheel(source):
    """The wheel, and what pip says of it."""
    out = source.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    command += ["-w", str(out), str(source)]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    (wheel,) = out.iterdir()
    return wheel, ran.stdout


def hook(name, source, out):
    """Run a hook of the build backend as pip does."""
    call = f"from setuptools import build_meta; build_meta.{name}({str(out)!r})"
    command = [sys.executable, "-c", call]
    subprocess.run(command, cwd=source, capture_output=True, check=True)


def libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
    assert all(name.startswith("precalib_kernels/toolchain/compiled/") for name in names)
    return {Path(name).name for name in names}


def test_a_wheel_built_with_a_compiler_holds_libraries_of_this_platform(source, compiler):
    old = source / "build" / "lib" / "precalib_kernels" / "toolchain" / "compiled"
    old.mkdir(parents=True)
    (old / "viterbi-0123456789abcdef.so").write_text("of sources that have changed since")
    wheel, _ = pip_wheel(source)
    here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{here}.whl")
    assert libraries(wheel) == file_names()


@pytest.mark.usefixtures("no_compiler")
def test_a_wheel_built_without_a_compiler_is_pure_and_says_so(source):
    wheel, said = pip_wheel(source)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == set()
    lines = [line for line in said.splitlines() if "vllm-precalib: library" in line]
    assert len(lines) == 3
    assert "is left for its first use: no C++ compiler" in lines[0]


@pytest.mark.usefixtures("no_compiler")
def test_a_wheel_holds_the_product_and_nothing_else(source):
    wheel, _ = pip_wheel(source)
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        described = email.message_from_bytes(archive.read(metadata))
    shipped = (".py", ".cpp", ".h", ".css", ".html", ".j2", ".js", ".typed")
    wanted = {
        path.relative_to(parent)
        for parent, package in (
            (ROOT / "kernels", "precalib_kernels"),
            (ROOT, "offline_quantize"),
            (ROOT, "vllm_precalib"),
        )
        for path in (parent / package).rglob("*")
        if path.suffix in shipped
    }
    assert held == wanted
    for package in ("precalib_kernels", "offline_quantize", "vllm_precalib"):
        assert Path(package, "py.typed") in held
    assert "Typing :: Typed" in described.get_all("Classifier")
    assert described["License-Expression"] == "Apache-2.0"
    core = [text for text in described.get_all("Requires-Dist") if "extra ==" not in text]
    assert any(text.startswith("numpy") for text in core)
    assert not any(text.startswith(("vllm", "packaging", "openai")) for text in core)


def test_an_editable_installation_fills_the_cache_and_leaves_the_sources(
    source, compiler, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "wheel"
    out.mkdir()
    hook("build_editable", source, out)
    assert {path.name for path in (tmp_path / "cache" / "precalib").iterdir()} == file_names()
    assert not list(source.rglob("*.so"))
    (wheel,) = out.iterdir()
    assert libraries(wheel) == set()


def test_an_archive_of_sources_has_all_that_is_compiled(source, tmp_path):
    hook("build_sdist", source, tmp_path)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("kernels", "offline_quantize")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    wanted = [path for path in files if path.suffix in (".cpp", ".h")]
    assert {"setup.py", *(str(path.relative_to(ROOT)) for path in wanted)} <= held
