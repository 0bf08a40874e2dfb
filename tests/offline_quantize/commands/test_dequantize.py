"""`precalib dequantize` gives back an ordinary checkpoint: no lock-in."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import random_llama

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import open_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor(checkpoint, quantize, precalib, tmp_path, contents, dtype, shards):
    source = checkpoint(shards=shards)
    packed, target = quantize(source, "--override", "mlp=rtn-3"), tmp_path / "back"
    ran = precalib("dequantize", packed, target, "--dtype", dtype)
    assert (ran.code, ran.err) == (0, "")

    opened, before, after = open_packed(packed), open_checkpoint(source), open_checkpoint(target)
    assert after.config == before.config
    assert {f: set(s) for f, s in after.shards.items()} == {
        f: set(s) for f, s in before.shards.items()
    }
    tensors = {n: t for file in after.shards for n, t in load_file(target / file).items()}
    original = {n: t for file in before.shards for n, t in load_file(source / file).items()}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in opened.config.modules:
            assert torch.equal(tensor, opened.weight(module).to(DTYPES[dtype]))
        else:
            assert torch.equal(tensor, original[name])
    side = {"tokenizer.json", "generation_config.json", "code/deep/bytes.txt"}
    names = contents(source).keys()
    assert side < names
    assert contents(target).keys() == names
    if shards > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_and_quantizes_alike(tmp_path, quantize, precalib, tied):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160}
    model = random_llama(**sizes, tie_word_embeddings=tied, attention_bias=True).bfloat16()
    model.save_pretrained(tmp_path / "source")
    packed = quantize(tmp_path / "source", "--group-size", 64)
    assert precalib("dequantize", packed, tmp_path / "back").code == 0
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    opened = open_packed(packed)
    assert len(opened.config.modules) == 14
    state = loaded.state_dict()
    for module in opened.config.modules:
        assert torch.equal(state[f"{module}.weight"], opened.weight(module).bfloat16())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        change = (loaded(ids).logits - model.eval()(ids).logits).float()
        scale = model(ids).logits.float().std()
    assert 0 < change.std() < 0.2 * scale


def test_the_way_back_and_forth(checkpoint, quantize, precalib, tmp_path):
    """What was dequantized can be quantized again."""
    packed = quantize(checkpoint(), "--recipe", "rtn-4")
    assert precalib("dequantize", packed, tmp_path / "back").code == 0
    again = quantize(tmp_path / "back", "--recipe", "rtn-4", target="again")
    manifest = json.loads((again / "precalib.json").read_text())
    assert manifest["totals"]["mean_relative_error"] < 1e-4


def test_what_cannot_be_dequantized(checkpoint, quantize, precalib, tmp_path, edit_json):
    source = checkpoint()
    assert "not a packed checkpoint" in precalib("dequantize", source, tmp_path / "x").sentence
    packed = quantize(source)
    assert "lies in the source" in precalib("dequantize", packed, packed / "x").sentence
    assert "is not empty" in precalib("dequantize", packed, source).sentence
    edit_json(
        packed / "config.json",
        lambda c: c["quantization_config"]["modules"].update(ghost="balanced-4"),
    )
    ran = precalib("dequantize", packed, tmp_path / "x")
    assert "config.json: its size is not the recorded one; copy the checkpoint" in ran.sentence
    os.truncate(packed / "model.safetensors", 20_000)
    ran = precalib("dequantize", packed, tmp_path / "x")
    assert "model.safetensors: not a whole safetensors file" in ran.sentence
    assert not (tmp_path / "x").exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda root: flip(root / "model.safetensors"), "its sha256 is not the recorded one"),
        (lambda root: flip(root / "tokenizer.json"), "its sha256 is not the recorded one"),
        (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json: the file is missing"),
        (lambda root: (root / "precalib.json").unlink(), "precalib.json: the file is missing"),
        (lambda root: flip(root / "precalib.json"), "precalib.json: not valid JSON"),
        (
            lambda root: (root / "x.safetensors").symlink_to("model.safetensors"),
            "x.safetensors: is not part of the checkpoint",
        ),
    ],
)
def test_what_verify_finds_is_not_dequantized(
    checkpoint, quantize, precalib, tmp_path, damage, text
):
    packed = quantize(checkpoint(), "--recipe", "rtn-4")
    damage(packed)
    assert precalib("verify", packed).code == 1
    assert text in precalib("dequantize", packed, tmp_path / "back").sentence
    assert not (tmp_path / "back").exists()
