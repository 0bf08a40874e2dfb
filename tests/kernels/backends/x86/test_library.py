"""The library of kernels: its ISAs, what it needs of torch, and doing without some of either."""

import ctypes
import itertools
import platform
import subprocess
import types

import pytest

from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain import compile as build

if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("there are CPU kernels for x86-64 only", allow_module_level=True)

SCRIPT = """#!/bin/sh
for argument; do case "$argument" in
{refused}) echo "mine: note: looking" >&2
  echo "mine: error: unrecognized command-line option '$argument'" >&2; exit 1;;
esac; done
exec g++ {added} "$@"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """g++, but refusing some options and adding others."""

    def make(refused="-none", added=""):
        script = tmp_path / "mine"
        script.write_text(SCRIPT.format(refused=refused, added=added))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return make


def test_an_isa_that_cannot_be_compiled_does_not_take_the_others_with_it(compiler, tmp_path):
    compiler(refused="-mavx512*|-mavxvnni|-mamx*")
    path = tmp_path / "out" / "cpu.so"
    remarks = build.compile_library(library.definition(), path)
    assert len(remarks) == len(library.ISAS) - 1
    for isa, remark in zip(library.ISAS[1:], remarks, strict=True):
        assert remark.startswith(f"kernels for {isa.name} are left out: {tmp_path / 'mine'} failed")
        flag = "-mavxvnni" if isa is library.AVX_VNNI else "-mavx512f"
        assert f"unrecognized command-line option '{flag}'" in remark
    made = ctypes.CDLL(str(path))
    states = [made.precalib_isa_state(ctypes.c_int64(i)) & 1 for i in range(len(library.ISAS))]
    assert states == [1, 0, 0, 0, 0, 0]


def test_clang_is_refused_and_gcc_used_instead(compiler, tmp_path):
    script = compiler(added="-D__clang__")
    options = library.BuildOptions(isas=(library.AVX2,))
    (remark,) = build.compile_library(library.definition(options), tmp_path / "out" / "cpu.so")
    assert remark.startswith(f"{script} failed on linear.cpp: ")
    assert "the kernels need GCC" in remark
    assert remark.endswith(f"; {build.find_compilers()[1]} is used instead")


@pytest.mark.parametrize(
    "unit", library.definition().units, ids=lambda unit: unit.optional or unit.source.name
)
def test_the_kernels_compile_without_warnings(unit):
    command = [build.find_compiler(), *unit.flags, "-Werror", "-fsyntax-only", str(unit.source)]
    version = subprocess.run([command[0], "-dumpversion"], capture_output=True, text=True)
    if version.stdout.strip().partition(".")[0] != "12":
        pytest.skip("each version of GCC has warnings of its own; the sources are clean with 12")
    subprocess.run(command, check=True)


def test_isas_have_the_features_of_those_before_them():
    # AVX-VNNI is no part of AVX-512: some processors have only the one, some only the other.
    ladder = [isa for isa in library.ISAS if isa is not library.AVX_VNNI]
    for one, two in (*itertools.pairwise(ladder), library.ISAS[:2]):
        assert two.requires[: len(one.requires)] == one.requires
        assert two.flags[: len(one.flags)] == one.flags


def test_the_library_knows_the_isas_by_name():
    made = library.load()
    indices = [made.precalib_isa_index(isa.name.encode()) for isa in library.ISAS]
    assert indices == list(range(len(library.ISAS)))
    assert made.precalib_isa_index(b"avx10") == -1
    assert library.supported_isas() == tuple(isa.name for isa in library.ISAS if isa.supported())
    assert not any(isa.missing() for isa in library.ISAS)


@pytest.mark.parametrize("version", ["2.9.0", "2.13.0+cpu", "2.99.1a0+git1234"])
def test_a_torch_of_the_supported_range_is_taken(version):
    library.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.8.1", "3.0.0", "1.13.1", "unknown"])
def test_another_torch_is_refused_in_a_sentence(version):
    with pytest.raises(build.BuildError, match=r"work with torch from 2\.9 to before 3\.0, not "):
        library.check_torch_version(version)


def test_a_torch_without_the_functions_is_told_of():
    with pytest.raises(build.BuildError, match=r"^torch 2\.9 lacks what .*aoti_torch_get_data_ptr"):
        library.torch_struct(types.SimpleNamespace(), "2.9")


def test_another_struct_of_functions_than_the_compiled_one_is_refused(monkeypatch):
    monkeypatch.setattr(library, "TORCH_CONSTANTS", library.TORCH_CONSTANTS[::-1])
    with pytest.raises(build.BuildError, match="differ about the functions of torch"):
        library.load.__wrapped__()
