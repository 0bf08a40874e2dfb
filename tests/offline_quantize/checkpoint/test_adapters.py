"""Folders that hold an adapter and no model are refused, with the way to serve one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from offline_quantize.checkpoint.source import open_checkpoint
from precalib_kernels.errors import SourceError

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {
    f"{PREFIX}.lora_{part}.weight": torch.zeros(shape) for part, shape in (("A", 16), ("B", 32))
}
BASE = {"base_model_name_or_path": "org/base"}


@pytest.fixture
def adapter(tmp_path):
    """Writes a folder with an adapter's tensors and configuration, as PEFT does."""

    def write(config, tensors=LORA, file="adapter_model.safetensors", model_config=True):
        root = tmp_path / "adapter"
        root.mkdir()
        save_file(tensors, root / file)
        if config is not None:
            (root / "adapter_config.json").write_text(json.dumps(config))
        if model_config:
            (root / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
        return root

    return write


@pytest.mark.parametrize("model_config", [True, False])
@pytest.mark.parametrize(
    ("rank", "more"), [(16, ""), (17, " --max-lora-rank 32"), (9999, " --max-lora-rank 512")]
)
def test_how_to_serve_it_is_told(adapter, precalib, tmp_path, model_config, rank, more):
    root = adapter({"peft_type": "LORA", "r": rank, **BASE}, model_config=model_config)
    sentence = precalib("quantize", root, tmp_path / "packed").sentence
    assert sentence == (
        f"precalib: {root}: is an adapter (LoRA), not a model; quantize its base model (org/base) "
        "and serve both: vllm serve PACKED --enable-lora "
        f"--lora-modules NAME={root}{more}"
    )
    assert not (tmp_path / "packed").exists()


def test_other_kinds_are_to_be_merged(adapter):
    with pytest.raises(SourceError, match=r"adapter \(IA3\), not a model; merge it into its base"):
        open_checkpoint(adapter({"peft_type": "IA3"}))


@pytest.mark.parametrize("config", ["{", "[]", '{"peft_type": 3, "r": "x"}'])
def test_a_damaged_configuration_is_one_all_the_same(adapter, config):
    root = adapter({})
    (root / "adapter_config.json").write_text(config)
    with pytest.raises(SourceError, match="is an adapter"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    "names",
    [
        list(LORA),
        ["unet.down_blocks.0.attn1.to_q.lora_A.weight"],
        ["model.layers.0.mlp.lora_down.weight", "model.layers.0.mlp.lora_up.weight"],
        ["model.layers.0.self_attn.k_proj.ia3_l"],
        ["base_model.model.score.modules_to_save.weight"],
    ],
)
def test_tensors_tell_without_a_configuration(adapter, names):
    root = adapter(None, {name: torch.zeros(2) for name in names}, "model.safetensors")
    with pytest.raises(SourceError, match="is an adapter"):
        open_checkpoint(root)


def test_a_model_with_built_in_adapters_is_a_model(checkpoint, weights):
    name = "model.layers.0.self_attn.q_proj"
    tensors = weights().llama() | {f"{name}.lora_A.vision.weight": torch.zeros(16, 128)}
    assert open_checkpoint(checkpoint(tensors=tensors)).root


def test_a_model_beside_an_adapter_loses_the_adapter(checkpoint, precalib, tmp_path):
    source = checkpoint(files={"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    ran = precalib("quantize", source, tmp_path / "packed", "--recipe", "rtn-4")
    assert "(a server needs none of them): adapter_config.json, adapter_model.safe" in ran.out
