"""A core installation has all it needs, and every import of the product is declared."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    name: ROOT / folder
    for name, folder in (
        ("precalib_kernels", "kernels/precalib_kernels"),
        ("offline_quantize", "offline_quantize"),
        ("vllm_precalib", "vllm_precalib"),
    )
}
# What a part of the product may import beyond the core, and the extra that brings it. Triton comes
# with vLLM and with torch for GPUs.
BEYOND_CORE = MappingProxyType(
    {
        "precalib_kernels.backends.triton": {"triton": "cuda"},
        "offline_quantize.benchmark": {"psutil": "bench", "matplotlib": "report"},
        "offline_quantize.method.feedback_triton": {"triton": "cuda"},
        "offline_quantize.method.trellis_triton": {"triton": "cuda"},
        "offline_quantize.calibration": {"transformers": "eval", "accelerate": "eval"},
        "offline_quantize.evaluation": {"transformers": "eval"},
        "offline_quantize.report": {"matplotlib": "report"},
        "offline_quantize.cli.doctor": {"vllm": "cuda"},
        "offline_quantize.checkpoint.ray_pool": {"ray": "ray"},
        "vllm_precalib": {"vllm": "cuda", "packaging": "cuda", "triton": "cuda"},
        "vllm_precalib.endpoint": {
            "fastapi": "cuda",
            "starlette": "cuda",
            "aiohttp": "cuda",
            "prometheus-client": "cuda",
        },
    }
)
COMES_WITH = dict.fromkeys(
    ("triton", "fastapi", "starlette", "aiohttp", "prometheus-client"), "vllm"
)
NAMES = {"yaml": "pyyaml"}  # of distributions, where modules have another
# Modules of the core, beside all that these import when they are imported.
ENTRANCES = ("offline_quantize", "offline_quantize.cli.main")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(text).name) for text in requirements}


CORE = declared(PROJECT["dependencies"])


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def statements(body: list[ast.stmt], deep: bool) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; with `deep`, those of functions as well."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not deep:
            continue
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from statements([child], deep)
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                yield from statements(child.body, deep)


@cache
def imports(module: str, deep: bool) -> frozenset[str]:
    """Full names of what a module imports, standard library aside."""
    found: set[str] = set()
    for node in statements(ast.parse(modules()[module].read_text()).body, deep):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | (inner & set(modules()))
    return frozenset(
        name for name in found if name.partition(".")[0] not in sys.stdlib_module_names
    )


def core_modules() -> set[str]:
    """The entrances and what is imported with them."""
    seen: set[str] = set()
    waiting = list(ENTRANCES)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules():
            continue
        seen.add(name)
        parts = name.split(".")
        waiting += [".".join(parts[:i]) for i in range(1, len(parts))]  # the packages around it
        waiting += imports(name, deep=False)
    return seen


def others(module: str, deep: bool) -> set[str]:
    """Distributions of third parties that a module imports."""
    tops = {name.partition(".")[0] for name in imports(module, deep)} - set(PACKAGES)
    return {NAMES.get(name, canonical(name)) for name in tops}


@pytest.mark.parametrize("module", sorted(core_modules()))
def test_the_core_is_imported_with_core_dependencies_only(module):
    assert others(module, deep=False) <= CORE


def test_the_core_is_most_of_the_quantizer():
    """Else the test before this one tests nothing."""
    assert {
        "offline_quantize.commands.quantize",
        "precalib_kernels.format.layout",
    } <= core_modules()


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_import_is_declared(module):
    allowed = {
        canonical(COMES_WITH.get(name, name)): extra
        for place, names in BEYOND_CORE.items()
        if module == place or module.startswith(place + ".")
        for name, extra in names.items()
    }
    used = {COMES_WITH.get(name, name) for name in others(module, deep=True)} - CORE
    assert used <= set(allowed)
    for name in used:
        assert name in declared(PROJECT["optional-dependencies"][allowed[name]])


def test_no_core_dependency_is_idle():
    used = {name for module in modules() for name in others(module, deep=True)}
    assert CORE - used == set()


def installed_core() -> set[str]:
    """Distributions that `pip install vllm-precalib` brings, by their own metadata."""
    seen: set[str] = set()
    waiting = sorted(CORE)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonical(requirement.name))
    return seen


# Imports of other distributions fail as where they are not installed.
CORE_ONLY = """
import importlib.abc, sys
ABSENT = set(sys.argv.pop(1).split(","))
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from offline_quantize.cli.main import main
main()
"""


@pytest.mark.slow
def test_a_core_installation_quantizes(checkpoint_of_one_matrix, tmp_path):
    present = installed_core() | {canonical(PROJECT["name"])}
    tops = importlib.metadata.packages_distributions()
    absent = {top for top, names in tops.items() if not {canonical(n) for n in names} & present}
    assert {"vllm", "transformers", "matplotlib", "pytest"} <= absent
    target = tmp_path / "packed"

    def precalib(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CORE_ONLY, ",".join(sorted(absent)), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for words in (
        ("quantize", checkpoint_of_one_matrix, target, "--recipe", "rtn-4"),
        ("inspect", target),
        ("verify", target),
        ("dequantize", target, tmp_path / "dense"),
    ):
        done = precalib(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    done = precalib("eval", target, "--source", checkpoint_of_one_matrix, "--text", __file__)
    assert done.returncode
    assert "Traceback" not in done.stderr  # what is missing is a sentence


@pytest.fixture
def checkpoint_of_one_matrix(tmp_path):
    import json

    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 128).bfloat16()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_all_packages_are_in_the_distribution():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(setuptools["packages"]) == packages
    folders = {path.parent for path in modules().values()}
    assert folders == {path.parent for path in modules().values() if path.name == "__init__.py"}


def test_constraints_pin_all_that_is_declared():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonical(name): version for name, version in pairs}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["cpu"], *extras["report"], *extras["eval"]]
    for text in (*wanted, *extras["demo"], *extras["test"]):
        requirement = Requirement(text)
        if canonical(requirement.name) != PROJECT["name"]:
            assert requirement.specifier.contains(pins[canonical(requirement.name)])
