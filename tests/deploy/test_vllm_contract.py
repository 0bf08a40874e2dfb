"""The contract with vLLM: the installed one keeps it, and every kind of breach is found."""

import ast
import zipfile

import pytest
import python_source
import vllm_contract
from python_source import installed
from vllm_contract import faults

VLLM = installed("vllm")


def test_the_installed_vllm_keeps_the_contract():
    assert list(faults(VLLM)) == []


@pytest.fixture
def changed(monkeypatch):
    """Faults of the installed vLLM, or of our files, if `old` were `new` in one file."""

    def change(file, old, new):
        path = VLLM / file if (VLLM / file).is_file() else vllm_contract.ROOT / file
        text = path.read_text()
        assert old in text
        tree = ast.parse(text.replace(old, new))
        parse = python_source.parse
        for module in (python_source, vllm_contract):
            monkeypatch.setattr(module, "parse", lambda p: tree if p == path else parse(p))
        return "\n".join(faults(VLLM))

    return change


LAYERS = "model_executor/layers"
CASES = {
    "a function is gone": (
        f"{LAYERS}/linear.py",
        "def register_weight_loader_v2_supported_method(",
        "def register_other(",
        "vllm_precalib/linear_method.py: vLLM has no vllm.model_executor.layers.linear."
        "register_weight_loader_v2_supported_method",
    ),
    "a class behind another module is gone": (
        f"{LAYERS}/fused_moe/__init__.py",
        "RoutedExperts",
        "Other",
        "vLLM has no vllm.model_executor.layers.fused_moe.RoutedExperts",
    ),
    "a field of a dataclass has another name": (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py",
        "    zero_points: bool",
        "    zeros: bool",
        "MPLinearLayerConfig(…): missing a required argument: 'zeros'",
    ),
    "a function takes more": (
        "model_executor/kernels/linear/__init__.py",
        "def choose_mp_linear_kernel(\n    config",
        "def choose_mp_linear_kernel(\n    platform, config",
        "choose_mp_linear_kernel(…): missing a required argument",
    ),
    "vLLM passes more to our method": (
        f"{LAYERS}/quantization/base_config.py",
        "def get_quant_method(\n        self, layer",
        "def get_quant_method(\n        self, model, layer",
        "vllm_precalib.config.PrecalibConfig.get_quant_method: vLLM passes 'model'",
    ),
    "vLLM passes less to our method": (
        f"{LAYERS}/quantization/base_config.py",
        "def get_quant_method(\n        self, layer: torch.nn.Module, prefix: str\n",
        "def get_quant_method(\n        self, layer: torch.nn.Module\n",
        "vllm_precalib.config.PrecalibConfig.get_quant_method: vLLM does not pass 'prefix'",
    ),
    "a method becomes another kind": (
        f"{LAYERS}/quantization/base_config.py",
        "    @staticmethod\n    @abstractmethod\n    def get_config_filenames()",
        "    @abstractmethod\n    def get_config_filenames(self)",
        "PrecalibConfig.get_config_filenames: is another kind of method",
    ),
    "a method of classes becomes one of objects": (
        "vllm_precalib/config.py",
        "    @staticmethod\n    def get_config_filenames()",
        "    def get_config_filenames(self)",
        "PrecalibConfig.get_config_filenames: is another kind of method",
    ),
    "a new abstract method": (
        f"{LAYERS}/quantization/base_config.py",
        "    @abstractmethod\n    def get_name(",
        "    @abstractmethod\n    def new(self): ...\n\n    @abstractmethod\n    def get_name(",
        "vllm_precalib.config.PrecalibConfig: vLLM wants a method new",
    ),
    "a method that we call through super() is gone": (
        f"{LAYERS}/quantization/base_config.py",
        "def get_checkpoint_weight_mapper(",
        "def get_weight_mapper(",
        "vLLM has no method get_checkpoint_weight_mapper",
    ),
    "an attribute is gone": (
        f"{LAYERS}/vocab_parallel_embedding.py",
        "self.org_vocab_size =",
        "self.vocabulary =",
        "VocabParallelEmbedding has no 'org_vocab_size'",
    ),
    "a method of an object takes other arguments": (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py",
        "    def apply_weights(\n        self,\n",
        "    def apply_weights(\n        self,\n        scratch,\n",
        "MPLinearKernel.apply_weights(layer, x): missing a required argument",
    ),
    "a caller passes something new": (
        f"{LAYERS}/linear.py",
        "self.quant_method.create_weights(\n            self,\n",
        "self.quant_method.create_weights(\n            self, 1, 2, 3, 4, 5, 6, 7,\n",
        "self.quant_method.create_weights(…): too many positional arguments",
    ),
    "a caller does not pass the loader": (
        f"{LAYERS}/linear.py",
        "weight_loader=self.weight_loader,\n",
        "loader=self.weight_loader,\n",
        "self.quant_method.create_weights(…): does not pass weight_loader",
    ),
    "a kernel is gone": (
        "model_executor/kernels/linear/__init__.py",
        "MacheteLinearKernel",
        "OtherLinearKernel",
        "vLLM has no kernel MacheteLinearKernel",
    ),
    "our method lacks an argument": (
        "vllm_precalib/linear_method.py",
        "def tie_weights(self, *_: torch.nn.Module)",
        "def tie_weights(self, layer: torch.nn.Module)",
        "PrecalibLinearMethod.tie_weights: vLLM passes 'embed_tokens'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_breaches_are_found(changed, case):
    file, old, new, fault = CASES[case]
    assert fault in changed(file, old, new)


def test_variables_of_the_documents_are_known(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Set `VLLM_CPU_KVCACHE_SPACE` and `VLLM_NOT_THERE`.\n")
    monkeypatch.setattr(vllm_contract, "documents", lambda: [page])
    monkeypatch.setattr(vllm_contract, "ROOT", tmp_path)
    package = python_source.Package(VLLM)
    found = list(vllm_contract.variable_faults(package))
    assert found == ["page.md: vLLM does not know VLLM_NOT_THERE"]


def test_code_in_documents_is_read(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nfrom vllm import LLM, Gone\n\nLLM()\n```\n")
    monkeypatch.setattr(vllm_contract, "ROOT", tmp_path)
    package = python_source.Package(VLLM)
    ((where, tree),) = vllm_contract.trees(page)
    assert list(vllm_contract.import_faults(package, tree, where)) == [
        "page.md: vLLM has no vllm.Gone"
    ]
    assert list(vllm_contract.call_faults(package, tree, where)) == [
        "page.md, line 3: LLM(…): missing a required argument: 'model'"
    ]


def test_a_wheel_is_read(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "vllm-9.9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/envs.py", "")
        archive.writestr("vllm/_C.abi3.so", "machine code")
        archive.writestr("vllm-9.9.dist-info/METADATA", "Name: vllm\nVersion: 9.9\n\ntext\n")
    folder = tmp_path / "unpacked"
    monkeypatch.setattr("sys.argv", ["vllm_contract.py", str(wheel), "--unpack", str(folder)])
    with pytest.raises(SystemExit, match="True"):
        vllm_contract.main()
    out = capsys.readouterr().out
    assert "vLLM has no vllm.model_executor.layers.linear.LinearBase" in out
    assert sorted(path.name for path in folder.rglob("*.*") if path.is_file()) == ["envs.py"]
    (metadata,) = folder.rglob("METADATA")
    assert "\nVersion: 9.9+cpu\n" in metadata.read_text()


def test_a_folder_without_vllm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vllm_contract.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        vllm_contract.main()
    assert f"no vLLM in {tmp_path}; name a wheel" in capsys.readouterr().err
