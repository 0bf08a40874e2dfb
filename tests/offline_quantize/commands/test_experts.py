"""Experts in 3-D tensors: the same bytes as of experts apart, and the same tensors back."""

import json
import re

import pytest
import torch
from quantized_output import load
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.planning.weight_choice import KEPT
from precalib_kernels.errors import FormatError

EXPERTS, INNER, HIDDEN = 3, 64, 128
LAYER = "model.layers.0"
CONFIG = {"num_hidden_layers": 1}
SMALL = ("--bits", 3, "--group-size", 64)


def stacked(make, transposed=False, prefix=f"{LAYER}.mlp.experts"):
    """A layer whose experts are two tensors; transposed: inputs come first."""
    gate_up, down = make(EXPERTS, 2 * INNER, HIDDEN), make(EXPERTS, HIDDEN, INNER)
    if transposed:
        gate_up, down = (t.transpose(1, 2).contiguous() for t in (gate_up, down))
    return {
        f"{LAYER}.self_attn.o_proj.weight": make(HIDDEN, HIDDEN),
        f"{prefix}.gate_up_proj": gate_up,
        f"{LAYER}.mlp.gate.weight": make(EXPERTS, HIDDEN),
        f"{prefix}.down_proj": down,
    }


def apart(tensors, transposed=False):
    """The same experts as matrices of their own, in the same order."""
    result = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if tensor.dim() != 3:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            matrix = matrix.T if transposed else matrix
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for part, rows in zip(leaves, matrix.chunk(len(leaves)), strict=True):
                result[f"{prefix}.{expert}.{part}.weight"] = rows.contiguous()
    return result


def packed_tensors(target):
    return {name: tensor for name, tensor in load(target).items() if ".experts." in name}


@pytest.mark.parametrize(
    ("kind", "transposed"), [("qwen3_moe", False), ("qwen3_moe", True), ("llama4_text", True)]
)
def test_they_are_packed_to_the_bytes_of_experts_apart(
    checkpoint, weights, quantize, kind, transposed
):
    tensors, config = stacked(weights(), transposed), CONFIG | {"model_type": kind}
    options = ("--group-size", 64, "--activations", "none")
    one = quantize(checkpoint("one", tensors, config=config), *options, target="a")
    other = checkpoint("other", apart(tensors, transposed), config=config)
    two = quantize(other, *options, target="b")
    found, expected = packed_tensors(one), packed_tensors(two)
    assert found.keys() == expected.keys()
    assert len(found) == 9 * 5
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    manifests = read_manifest(one), read_manifest(two)
    assert manifests[0].tensors == manifests[1].tensors
    assert list(manifests[0].unquantized) == [f"{LAYER}.mlp.gate.weight"]


@pytest.mark.parametrize(("kind", "transposed"), [("qwen3_moe", False), ("gpt_oss", True)])
@pytest.mark.parametrize("shards", [1, 2])
def test_they_come_back_as_they_were(
    checkpoint, weights, quantize, precalib, tmp_path, kind, transposed, shards
):
    tensors = stacked(weights(torch.float32), transposed)
    config = CONFIG | {"model_type": kind}
    source = checkpoint(tensors=tensors, config=config, shards=shards)
    packed = quantize(source, "--group-size", 64)
    ran = precalib("dequantize", packed, tmp_path / "back", "--dtype", "float32")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    back, opened = load(tmp_path / "back"), open_packed(packed)
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert 0 < (back[name] - tensor).square().sum() < 0.02 * tensor.square().sum() or (
            torch.equal(back[name], tensor) and name.endswith("gate.weight")
        )
    first = back[f"{LAYER}.mlp.experts.down_proj"][1]
    expected = opened.weight(f"{LAYER}.mlp.experts.1.down_proj")
    assert torch.equal(first.T if transposed else first, expected)
    if kind == "gpt_oss":  # whose rows of gate and up alternate, and stay together
        assert opened.shape(f"{LAYER}.mlp.experts.0.gate_up_proj") == (2 * INNER, HIDDEN)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_source_is_compared(checkpoint, weights, quantize, precalib, tmp_path, shards):
    tensors = stacked(weights(), transposed=True)
    config = CONFIG | {"model_type": "llama4_text"}
    source = checkpoint(tensors=tensors, config=config, shards=shards)
    packed = quantize(source, "--group-size", 64)
    ran = precalib("verify", packed, "--against", source)
    assert (ran.code, ran.err) == (0, "")
    assert "of 10 packed weights are right" in ran.out
    changed = dict(tensors)
    changed[f"{LAYER}.mlp.experts.down_proj"] = tensors[f"{LAYER}.mlp.experts.down_proj"].flip(0)
    other = checkpoint("other", changed, config=config, shards=shards)
    ran = precalib("verify", packed, "--against", other)
    assert ran.code == 1
    assert f"{LAYER}.mlp.experts.0.down_proj: relative error" in ran.err
    assert "gate_proj" not in ran.err


def test_all_experts_of_a_layer_share_what_target_bits_gives(checkpoint, weights, quantize):
    tensors = stacked(lambda *shape: weights(torch.float32)(*(2 * n for n in shape)))
    config = CONFIG | {"model_type": "qwen3_moe"}
    packed = open_packed(quantize(checkpoint(tensors=tensors, config=config), "--target-bits", 3.9))
    found = {}
    for module, layout in packed.config.modules.items():
        found.setdefault(module.rpartition(".")[2], set()).add(layout)
    assert {leaf: len(layouts) for leaf, layouts in found.items()} == dict.fromkeys(found, 1)
    assert found["gate_proj"] == found["up_proj"]
    assert len(set.union(*found.values())) > 1


def test_granite_names_its_tensors_otherwise(checkpoint, weights, quantize, precalib, tmp_path):
    make, prefix = weights(), f"{LAYER}.block_sparse_moe"
    tensors = {
        f"{prefix}.input_linear.weight": make(EXPERTS, 2 * INNER, HIDDEN),
        f"{prefix}.output_linear.weight": make(EXPERTS, HIDDEN, INNER),
        f"{prefix}.router.layer.weight": make(EXPERTS, HIDDEN),
    }
    source = checkpoint(tensors=tensors, config=CONFIG | {"model_type": "granitemoe"})
    packed = quantize(source, "--group-size", 64)
    assert f"{prefix}.experts.2.up_proj" in open_packed(packed).config.modules
    assert precalib("verify", packed, "--against", source).code == 0
    assert precalib("dequantize", packed, tmp_path / "back").code == 0
    assert {n: t.shape for n, t in load(tmp_path / "back").items()} == {
        n: t.shape for n, t in tensors.items()
    }


def test_what_is_not_known_of_a_model_stays_and_is_told(checkpoint, weights, precalib, tmp_path):
    tensors = stacked(weights())
    source = checkpoint(tensors=tensors, config=CONFIG | {"model_type": "llama"})
    for options in (["--dry-run"], []):
        ran = precalib("quantize", source, tmp_path / "target", *options)
        share = 100 * 9 * INNER * HIDDEN / sum(t.numel() for t in tensors.values())
        assert f"Note: {share:.1f} % of the model's weights stay unquantized as experts" in ran.out
        assert f"Kept ({KEPT}): " in ran.out
        stays = share + 100 * EXPERTS * HIDDEN / sum(t.numel() for t in tensors.values())
        assert f"{stays:.1f} % of its 90,496 weights stay unquantized." in ran.out
    inspected = precalib("inspect", tmp_path / "target").out
    line = next(line for line in ran.out.splitlines() if line.startswith("Whole model: "))
    assert line in inspected.splitlines()
    size = sum(t.nbytes for t in load_file(tmp_path / "target" / "model.safetensors").values())
    assert line.startswith(f"Whole model: {8 * size / 90496:.3f} effective bits per weight; ")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{LAYER}.mlp.experts.down_proj"),
        lambda t: t.update({f"{LAYER}.mlp.experts.down_proj": torch.ones(EXPERTS, 64, HIDDEN - 1)}),
        lambda t: t.update({f"{LAYER}.mlp.experts.down_proj": torch.ones(EXPERTS + 1, 128, 64)}),
    ],
)
def test_shapes_that_do_not_fit_together_stay(checkpoint, weights, quantize, change):
    tensors = stacked(weights())
    change(tensors)
    source = checkpoint(tensors=tensors, config=CONFIG | {"model_type": "qwen3_moe"})
    manifest = read_manifest(quantize(source))
    assert manifest.unquantized[f"{LAYER}.mlp.experts.gate_up_proj"] == KEPT
    assert list(manifest.tensors) == [f"{LAYER}.self_attn.o_proj"]


@pytest.mark.parametrize("form", [stacked, lambda make: apart(stacked(make))])
def test_experts_are_kept_all_or_not_at_all(
    checkpoint, weights, quantize, precalib, form, tmp_path
):
    tensors = form(weights())
    source = checkpoint(tensors=tensors, config=CONFIG | {"model_type": "qwen3_moe"})
    kept = read_manifest(quantize(source, "--keep", r"\.experts\."))
    assert kept.unquantized.keys() == set(tensors) - {f"{LAYER}.self_attn.o_proj.weight"}
    for pattern in (r"experts\.1\.", "down_proj"):
        ran = precalib("quantize", source, tmp_path / "x", "--keep", pattern)
        assert "all of them are packed or none; widen or narrow --keep, which takes" in ran.sentence


def test_a_narrow_matrix_keeps_all_experts_of_its_layer(checkpoint, weights, quantize):
    make = weights()
    tensors = apart(stacked(make))
    for expert in range(EXPERTS):
        tensors[f"{LAYER}.mlp.experts.{expert}.down_proj.weight"] = make(HIDDEN, 48)
    manifest = read_manifest(quantize(checkpoint(tensors=tensors, config=CONFIG)))
    assert list(manifest.tensors) == [f"{LAYER}.self_attn.o_proj"]
    reason = manifest.unquantized[f"{LAYER}.mlp.experts.0.up_proj.weight"]
    assert reason == "beside an expert that stays: input size 48 is not a multiple of 32"


def test_all_experts_of_a_layer_get_one_recipe(checkpoint, weights, precalib, tmp_path):
    source = checkpoint(tensors=apart(stacked(weights())), config=CONFIG)
    ran = precalib(
        "quantize", source, tmp_path / "x", *SMALL, "--override", r"experts\.1\.(gate|up)=rtn-4"
    )
    assert "vLLM computes these as one layer, so they need one recipe" in ran.sentence


def test_a_weight_that_cannot_be_packed_names_all_experts(checkpoint, weights, precalib, tmp_path):
    tensors = stacked(weights(torch.float32))
    tensors[f"{LAYER}.mlp.experts.gate_up_proj"][1] *= 1e9
    source = checkpoint(tensors=tensors, config=CONFIG | {"model_type": "qwen3_moe"})
    options = ("--group-size", 64, "--activations", "none")
    ran = precalib("quantize", source, tmp_path / "x", *options)
    pattern = ran.err.splitlines()[0].partition("--keep '")[2].partition("'")[0]
    assert precalib("quantize", source, tmp_path / "x", *options, "--keep", pattern).code == 0


def test_parts_of_another_shape_are_refused(checkpoint, weights, quantize, precalib):
    source = checkpoint(tensors=stacked(weights()), config=CONFIG | {"model_type": "qwen3_moe"})
    packed = quantize(source, "--group-size", 64, "--recipe", "rtn-4")
    tensors = load(packed)
    name = f"{LAYER}.mlp.experts.1.up_proj"
    for suffix in ("qweight", "scales", "zeros"):
        tensors[f"{name}.{suffix}"] = tensors[f"{name}.{suffix}"][:32].contiguous()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    whole = f"{LAYER}.mlp.experts.gate_up_proj"
    message = re.escape(f"{name} has shape [32, 128], but '{whole}' is made of parts of shape [64,")
    with pytest.raises(FormatError, match=message):
        open_packed(packed).expert_tensor(whole, torch.float32)
    assert re.search(message, precalib("verify", packed).err)
