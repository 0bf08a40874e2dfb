"""Compiling native sources: cached by content, one clear reason when it cannot be done."""

import pytest

from precalib_kernels.native import build


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "precalib"
    build.load.cache_clear()


def test_a_library_is_compiled_once_and_found_again(own_cache, monkeypatch):
    assert build.load("trellis").trellis_search
    (library,) = own_cache.iterdir()
    build.load.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert build.load("trellis")._name == str(library)


def test_other_flags_make_another_library(own_cache, monkeypatch):
    build.load("trellis")
    build.load.cache_clear()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.load("trellis")
    assert len(list(own_cache.iterdir())) == 2


def test_no_compiler_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.load("trellis")


def test_a_failing_compiler_is_quoted(own_cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag",))
    with pytest.raises(build.BuildError, match=r"failed on trellis.cpp: .*no-such-flag"):
        build.load("trellis")
    assert list(own_cache.iterdir()) == []


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.load("trellis")
