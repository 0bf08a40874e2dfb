"""Compiling native sources: cached by content, one clear reason when it cannot be done."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from offline_quantize.method.trellis import SOURCE
from precalib_kernels.backends.x86 import library
from precalib_kernels.toolchain import compile as build

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.load.cache_clear()
    yield tmp_path / "precalib"
    build.load.cache_clear()


def test_a_library_is_compiled_once_and_found_again(own_cache, monkeypatch):
    assert build.load(SOURCE).trellis_search
    (library,) = own_cache.iterdir()
    build.load.cache_clear()
    monkeypatch.setattr(build, "compile_library", lambda *_: pytest.fail("compiled twice"))
    assert build.load(SOURCE)._name == str(library)


def test_other_flags_make_another_library(own_cache, monkeypatch):
    build.load(SOURCE)
    build.load.cache_clear()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.load(SOURCE)
    assert len(list(own_cache.iterdir())) == 2


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The trellis library where an installation has it."""
    monkeypatch.setattr(build, "COMPILED", tmp_path / "compiled")
    path = build.COMPILED / build.definition(SOURCE).file_name()
    build.compile_library(build.definition(SOURCE), path)
    return path


def test_an_installed_library_needs_no_compiler(installed, own_cache, no_compiler):
    assert build.load(SOURCE)._name == str(installed)
    assert not own_cache.exists()


def test_an_installed_library_of_other_flags_is_not_used(installed, own_cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert Path(build.load(SOURCE)._name).parent == own_cache


def test_a_library_for_this_processor_only_is_not_used_on_another(installed, monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: b"another")
    assert build.load(SOURCE)._name != str(installed)


def test_a_library_for_all_processors_is_known_on_another(monkeypatch):
    here = library.definition().file_name()
    monkeypatch.setattr(build, "_processor", lambda: b"another")
    assert library.definition().file_name() == here


def test_a_library_that_cannot_be_loaded_is_compiled_again(installed, own_cache):
    installed.write_bytes(b"of another system")
    assert Path(build.load(SOURCE)._name).parent == own_cache


def test_a_library_that_cannot_be_loaded_is_named_where_no_compiler_is(installed, no_compiler):
    installed.write_bytes(b"of another system")
    with pytest.raises(build.BuildError, match=f"cannot load {installed}: .*no C\\+\\+ compiler"):
        build.load(SOURCE)


def test_the_compiler_is_the_one_that_cxx_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("c++", "g++", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("CXX", "mine")
        assert build.find_compiler() == str(tmp_path / name)
    monkeypatch.setenv("CXX", "mine --not-a-name")
    assert build.find_compiler() == str(tmp_path / "g++")


def test_a_compiler_is_tried_once_under_all_of_its_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "g++").write_text("")
    (tmp_path / "g++").chmod(0o755)
    (tmp_path / "c++").symlink_to("g++")
    assert build.find_compilers() == [str(tmp_path / "g++")]


@pytest.fixture
def no_program(tmp_path, monkeypatch):
    path = tmp_path / "mine"
    path.write_text("")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_a_compiler_that_is_no_program_is_a_reason(no_program, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="mine cannot be run"):
        build.load(SOURCE)


def test_where_a_compiler_fails_another_is_used_and_named(no_program):
    second = re.escape(build.find_compilers()[1])
    text = f"^{no_program} cannot be run .*; {second} is used instead; delete .*viterbi-.* to have"
    with pytest.warns(UserWarning, match=text):
        assert build.load(SOURCE).trellis_search


@pytest.fixture
def two_units(tmp_path):
    """A library of a unit that can be compiled and an optional one that cannot."""
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (tmp_path / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    units = [
        build.Unit(tmp_path / "one.cpp", ("-fPIC",)),
        build.Unit(tmp_path / "two.cpp", ("-fPIC", "-mno-such-isa"), "functions for two"),
    ]
    return build.Library("both", tuple(units))


def test_an_optional_part_that_cannot_be_compiled_is_left_out_and_named(two_units):
    text = r"^functions for two are left out: .* failed on two.cpp: .*-mno-such-isa.*; delete "
    with pytest.warns(UserWarning, match=text):
        made = build.load_library(two_units)
    assert made.one() == 1
    assert not hasattr(made, "two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load_library(two_units).one() == 1  # as it was kept


def test_the_search_compiles_without_warnings():
    command = [build.find_compiler(), *build.FLAGS, "-Werror", "-fsyntax-only", str(SOURCE)]
    subprocess.run(command, check=True)


def test_the_build_needs_the_standard_library_only():
    bare = f"import sys; sys.path.append({str(build.COMPILED.parents[2])!r})"
    imports = "import precalib_kernels.toolchain.compile, precalib_kernels.backends.x86.library"
    subprocess.run([sys.executable, "-I", "-S", "-c", f"{bare}; {imports}"], check=True)


def test_no_compiler_is_a_reason_not_a_crash(no_compiler):
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.load(SOURCE)


def test_a_failing_compiler_is_quoted(own_cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag",))
    with pytest.raises(build.BuildError, match=r"failed on viterbi.cpp: .*no-such-flag"):
        build.load(SOURCE)
    assert list(own_cache.iterdir()) == []


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.load(SOURCE)


def test_of_two_processes_one_compiles(own_cache, tmp_path):
    """The compiler is a script that takes long and writes down each of its calls."""
    calls, compiler = tmp_path / "calls", tmp_path / "slow-compiler"
    compiler.write_text(f'#!/bin/sh\necho >> {calls}\nsleep 1\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    code = (
        "import sys; from pathlib import Path; from precalib_kernels.toolchain import compile;"
        "library = compile.Library('one', (compile.Unit(Path(sys.argv[1]), ('-fPIC',)),));"
        "print(compile.load_library(library).one())"
    )
    environment = os.environ | {"CXX": str(compiler)}
    command = [sys.executable, "-c", code, str(source)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=100)[0] for process in both] == ["1\n", "1\n"]
    assert calls.read_text().count("\n") == 2  # of one process: compiling and linking
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]
