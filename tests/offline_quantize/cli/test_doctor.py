from importlib.metadata import version

import pytest

from offline_quantize.cli import doctor


@pytest.fixture
def findings(monkeypatch):
    monkeypatch.setattr(doctor, "_plugin", lambda: ("vLLM plugin", True, "registered"))
    monkeypatch.setattr(doctor, "_backends", lambda: iter([("backend fast", None, "no such CPU")]))
    return lambda: {what: (good, detail) for what, good, detail in doctor.diagnose()}


def test_versions_and_facts(findings):
    found = findings()
    assert found["torch"] == (None, version("torch"))
    assert found["entry point"] == (True, "vllm_precalib:register")
    assert found["accelerator"][0] is None


def test_the_compiler_that_is_there_and_none(tmp_path, monkeypatch):
    compiler = tmp_path / "mine"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert doctor._compiler() == ("C++ compiler", None, str(compiler))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler()[2] == "none; $CXX names none and the PATH has no g++, clang++, c++"


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda _: None)
    assert doctor._plugin()[1:] == (
        None,
        "vLLM is not installed; quantizing works, serving needs it",
    )


def test_a_backend_that_cannot_run_is_no_failure(findings, precalib):
    ran = precalib("doctor")
    assert ran.code == 0
    assert "     backend fast      no such CPU\n" in ran.out
    assert "ok   vLLM plugin       registered\n" in ran.out


def test_what_is_wrong_is_a_failure(findings, precalib, monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    ran = precalib("doctor")
    assert ran.code == 1
    assert "FAIL entry point       not registered; install vllm-precalib again\n" in ran.out
