"""The library of Arm kernels: what it is made of, and how it becomes torch's operator."""

import ctypes
import platform
import subprocess
import types

import pytest
import torch

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.x86 import library as x86
from precalib_kernels.toolchain import compile as build

REFUSING = """#!/bin/sh
for argument; do case "$argument" in
*i8mm*) echo "mine: error: unknown architecture '$argument'" >&2; exit 1;;
esac; done
exec {compiler} "$@"
"""


def test_other_processors_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(build.BuildError, match=r"^the kernels are for aarch64, this is x86_64$"):
        library.definition()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert library.definition() == library.sources()


def test_it_is_loaded_and_registered_as_the_operator(monkeypatch):
    functions = ("precalib_isa_index", "precalib_isa_state", "precalib_layout_bytes")
    fake = types.SimpleNamespace(**{name: types.SimpleNamespace() for name in functions})
    registered = []
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(library, "load_library", lambda made: {library.sources(): fake}[made])
    monkeypatch.setattr(x86, "register", registered.append)
    assert library.load.__wrapped__() is fake
    assert registered == [fake]
    assert fake.precalib_isa_index.restype is ctypes.c_int64
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(build.BuildError, match=r"work with torch from 2\.9 to before 3\.0"):
        library.load.__wrapped__()


def test_the_openmp_runtime_of_torch_is_found():
    line = "7f00-7f01 r-xp 00000000 fe:00 4242 {}\n"
    maps = "7f00-7f01 rw-p 00000000 00:00 0\n" + line.format("/usr/lib/libm.so.6")
    assert library.openmp_runtime(maps) is None
    other = "/a b/numpy.libs/libgomp-1.so.1"
    assert library.openmp_runtime(maps + line.format(other)) == other
    own = "/a b/torch.libs/libgomp-a49a47f9.so.1.0.0"
    assert library.openmp_runtime(maps + line.format(other) + line.format(own)) == own


def test_isas_are_those_of_library_and_machine(monkeypatch):
    states = {"dotprod": 3, "i8mm": 2}
    monkeypatch.setattr(library.Isa, "_state", lambda isa: states[isa.name])
    assert library.supported_isas.__wrapped__() == ("dotprod",)
    assert [isa.missing() for isa in library.ISAS] == [False, True]


@pytest.mark.slow
def test_an_isa_that_cannot_be_compiled_does_not_take_the_other_with_it(
    tools, tmp_path, monkeypatch
):
    script = tmp_path / "mine"
    script.write_text(REFUSING.format(compiler=tools.compiler))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    path = tmp_path / "out" / "cpu.so"
    (remark,) = build.compile_library(library.sources(flags=("-O0",)), path)
    assert remark.startswith(f"kernels for i8mm are left out: {script} failed on linear.cpp: ")
    assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit", library.sources().units, ids=lambda unit: unit.optional or unit.source.name
)
def test_the_kernels_compile_without_warnings(tools, unit):
    command = [tools.compiler, *unit.flags, "-Werror", "-fsyntax-only", str(unit.source)]
    version = subprocess.run([command[0], "-dumpversion"], capture_output=True, text=True)
    if version.stdout.strip().partition(".")[0] != "12":
        pytest.skip("each version of GCC has warnings of its own; the sources are clean with 12")
    subprocess.run(command, check=True)


@pytest.mark.slow
def test_the_library_has_the_operator_and_asks_for_nothing_of_torch(program):
    """OpenMP's functions stay undefined: the runtime that torch loads has them."""
    found = subprocess.run(
        [program.tools.compiler, "-print-prog-name=nm"], capture_output=True, text=True, check=True
    )
    listed = subprocess.run(
        [found.stdout.strip(), "-D", "--without-symbol-versions", program.library],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
    exported = {name for kind, name in symbols if kind == "T"}
    undefined = {name for kind, name in symbols if kind == "U"}
    assert exported >= {
        *("precalib_register", "precalib_torch_fields", "precalib_torch_bytes"),
        *("precalib_isa_index", "precalib_isa_state", "precalib_layout_bytes", "precalib_linear"),
    }
    assert not [name for name in undefined if "aoti" in name or "precalib" in name]
    assert any(name.startswith("GOMP_") for name in undefined)
