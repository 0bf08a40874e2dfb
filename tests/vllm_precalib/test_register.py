"""The entry point: light, repeatable, and one sentence when vLLM is not the one it knows."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vllm_precalib
from precalib_kernels.errors import ServingError
from vllm_precalib import compat

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vllm_precalib; print(*{'torch', 'vllm', 'triton'} & set(sys.modules))"
    assert run(code).strip() == ""


def test_the_entry_point_is_installed():
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="precalib")
    assert {entry.load() for entry in entries} == {vllm_precalib.register}


def test_registering_twice_is_harmless():
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    vllm_precalib.register()
    vllm_precalib.register()
    assert QUANTIZATION_METHODS.count("precalib") == 1
    assert get_quantization_config("precalib").__module__ == "vllm_precalib.config"


def test_nothing_is_defined_in_the_namespace_of_vllm():
    code = (
        "import torch\n"
        "import vllm.model_executor.layers.fused_moe  # defines operators of vLLM's own\n"
        "names = lambda: {s.name for s in torch._C._jit_get_all_schemas()}\n"
        "before = names()\n"
        "import vllm_precalib.linear\n"
        "print(*sorted(names() - before))"
    )
    assert run(code).split() == ["precalib::dequantize", "precalib::linear"]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_versions_inside_the_window(version):
    assert compat.version_warning(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_versions_outside_the_window_get_one_sentence(version):
    warning = compat.version_warning(version)
    assert warning == (
        f"precalib is tested with vLLM >=0.32,<0.34, this is {version}: it may not work; "
        "if it does not, install 'vllm>=0.32,<0.34' or a newer vllm-precalib"
    )


def test_the_window_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cuda,) = map(Requirement, project["optional-dependencies"]["cuda"])
    assert (cuda.name, cuda.specifier) == ("vllm", SpecifierSet(compat.SUPPORTED_VLLM))


def test_outside_the_window_it_registers_and_warns(logged, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    vllm_precalib.register()
    ((level, text),) = logged
    assert level == "WARNING"
    assert "this is 0.99.0" in text


def test_a_missing_name_is_one_sentence_with_the_fix():
    with (
        pytest.raises(
            ServingError,
            match=r"^vLLM 0\.\d+.* has changed .* \(cannot import name 'Gone' from 'vllm\.config' "
            r".* install 'vllm>=0\.32,<0\.34' or a newer vllm-precalib$",
        ),
        compat.vllm_names(),
    ):
        from vllm.config import Gone  # noqa: F401


def test_a_vllm_without_our_names_still_serves_other_models():
    """register() reports and returns: an exception would take every model down."""
    code = (
        "import vllm.model_executor.layers.quantization as q\n"
        "del q.register_quantization_config\n"
        "import logging, sys\n"
        "logging.getLogger('vllm.precalib').addHandler(logging.StreamHandler(sys.stdout))\n"
        "import vllm_precalib\n"
        "vllm_precalib.register()\n"
        "print(*q.QUANTIZATION_METHODS)"
    )
    *_, text, methods = run(code).strip().splitlines()
    assert text.startswith("precalib checkpoints cannot be served: vLLM 0.")
    assert text.endswith("install 'vllm>=0.32,<0.34' or a newer vllm-precalib")
    assert "precalib" not in methods.split()


def test_a_layer_name_vllm_lost_fails_only_packed_models():
    code = (
        "import torch, vllm.model_executor.layers.linear as linear\n"
        "import vllm_precalib\n"
        "vllm_precalib.register()\n"
        "from vllm_precalib.config import CheckpointConfig, PrecalibConfig\n"
        "del linear.register_weight_loader_v2_supported_method\n"
        "config = PrecalibConfig(CheckpointConfig('t', {}, {}))\n"
        "try: config.get_quant_method(torch.nn.Identity(), 'fc')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    text = run(code).strip().splitlines()[-1]
    assert text.startswith("ServingError vLLM 0.")
    assert text.endswith("install 'vllm>=0.32,<0.34' or a newer vllm-precalib")
