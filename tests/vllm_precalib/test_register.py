"""The entry point: light, repeatable, and one sentence when vLLM is not the one it knows."""

import importlib.metadata
import json
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
    cuda, _ = map(Requirement, project["optional-dependencies"]["cuda"])
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


LOSING_NAMES = """
import json, logging, torch
import vllm.model_executor.kernels.linear  # this and the next define operators of vLLM's own
import vllm.model_executor.layers.fused_moe
import vllm.model_executor.layers.linear as linear
import vllm.model_executor.layers.quantization as quantization
import vllm_precalib

def operators():
    return {schema.name for schema in torch._C._jit_get_all_schemas()}

before, lines = operators(), []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.precalib").addHandler(handler)

kept = quantization.register_quantization_config
del quantization.register_quantization_config
vllm_precalib.register()
result = {"lines": lines, "without": list(quantization.QUANTIZATION_METHODS)}
quantization.register_quantization_config = kept
vllm_precalib.register()
result["with"] = list(quantization.QUANTIZATION_METHODS)

from vllm_precalib.config import CheckpointConfig, PrecalibConfig
config = PrecalibConfig(CheckpointConfig("test", {}, {}))
kept = linear.register_weight_loader_v2_supported_method
del linear.register_weight_loader_v2_supported_method
try:
    config.get_quant_method(torch.nn.Identity(), "fc")
except Exception as error:
    result["raised"] = f"{type(error).__name__}: {error}"
linear.register_weight_loader_v2_supported_method = kept
config.get_quant_method(torch.nn.Identity(), "fc")
result["operators"] = sorted(operators() - before)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def losing_names():
    """What happens in a process where vLLM loses a name and finds it again."""
    return json.loads(run(LOSING_NAMES).splitlines()[-1])


def test_a_vllm_that_lost_a_name_still_serves_other_models(losing_names):
    """register() reports and returns: an exception would take every model down."""
    (line,) = losing_names["lines"]
    assert line.startswith("precalib checkpoints cannot be served: vLLM 0.")
    assert line.endswith("install 'vllm>=0.32,<0.34' or a newer vllm-precalib")
    assert "precalib" not in losing_names["without"]
    assert "precalib" in losing_names["with"]


def test_a_name_only_layers_need_fails_only_packed_models(losing_names):
    assert losing_names["raised"].startswith("ServingError: vLLM 0.")
    assert losing_names["raised"].endswith("or a newer vllm-precalib")


def test_operators_stay_in_our_own_namespace(losing_names):
    names = (
        *("cpu_gather_rows", "cpu_linear", "dequantize", "gather_rows", "gpu_dequantize"),
        *("gpu_gather_rows", "gpu_grouped_linear", "gpu_linear", "gpu_sparse", "linear"),
    )
    assert losing_names["operators"] == [f"precalib::{name}" for name in names]
