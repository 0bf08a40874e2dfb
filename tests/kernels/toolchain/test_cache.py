"""A library in the cache that others may have written is not loaded."""

import os
import shutil
import subprocess

import pytest

from precalib_kernels.toolchain import cache
from precalib_kernels.toolchain import compile as build

PLANTED = """
#include <cstdio>
__attribute__((constructor)) static void planted() { std::remove(MARK); }
extern "C" int answer() { return 666; }
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A library of one function, and a cache of its own for it."""
    if shutil.which("g++") is None:
        pytest.fail("there is no g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def planted(source, tmp_path):
    """A foreign library under the name of the right one; loading it would remove `mark`."""
    mark, code = tmp_path / "mark", tmp_path / "planted.cpp"
    mark.write_text("")
    code.write_text(PLANTED.replace("MARK", f'"{mark}"'))
    kept = cache.cache_directory() / build.definition(source).file_name()
    cache.make_private(kept.parent)
    subprocess.run(["g++", "-shared", "-fPIC", str(code), "-o", str(kept)], check=True)
    kept.chmod(0o755)
    return kept, mark


def others_folder(kept, monkeypatch):
    kept.parent.chmod(0o777)


def others_file(kept, monkeypatch):
    kept.chmod(0o775)


def linked(kept, monkeypatch):
    elsewhere = kept.with_name("elsewhere.so")
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("change", [others_folder, others_file, linked])
def test_a_planted_library_is_not_loaded(source, planted, monkeypatch, change):
    kept, mark = planted
    change(kept, monkeypatch)
    with pytest.warns(UserWarning, match=rf"{kept} is not loaded, as .*; it is compiled again"):
        assert build.load_library(build.definition(source)).answer() == 42
    assert mark.exists()
    assert cache.why_unsafe(kept) is None
    assert build.load_library(build.definition(source)).answer() == 42


@pytest.mark.slow
def test_one_of_another_user_is_not_loaded(source, planted, monkeypatch):
    """Neither his library nor his folder: where he owns the folder there is nothing to mend."""
    _, mark = planted
    monkeypatch.setattr(cache, "_trusted", lambda: {os.geteuid() + 1})
    with (
        pytest.warns(UserWarning, match="it or its folder belongs to another user"),
        pytest.raises(build.BuildError, match="set XDG_CACHE_HOME to a folder of your own"),
    ):
        build.load_library(build.definition(source))
    assert mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_compiled_is_private_under_any_umask(source, umask):
    before = os.umask(umask)
    try:
        assert build.load_library(build.definition(source)).answer() == 42
    finally:
        os.umask(before)
    (kept,) = cache.cache_directory().iterdir()
    assert cache.why_unsafe(kept) is None
    assert kept.parent.stat().st_mode & 0o077 == 0


def test_a_link_of_ones_own_is_followed(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cache.make_private(tmp_path / "link")
    (tmp_path / "real" / "x.so").touch(0o644)
    assert cache.why_unsafe(tmp_path / "link" / "x.so") is None
    (tmp_path / "real").chmod(0o770)
    assert cache.why_unsafe(tmp_path / "link" / "x.so")
    cache.make_private(tmp_path / "link")
    assert cache.why_unsafe(tmp_path / "link" / "x.so") is None


def test_nothing_there_is_not_unsafe(tmp_path):
    assert cache.why_unsafe(tmp_path / "none" / "x.so") is None
