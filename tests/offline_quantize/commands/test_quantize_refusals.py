"""Weights that a recipe would ruin are refused, with the option that keeps them."""

import re

import pytest
import torch
from quantized_output import BOUND, check

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.method.recipes import RECIPES


@pytest.fixture
def with_small(checkpoint, weights):
    """A checkpoint in two files, with weights of these patterns too small for float16 scales."""

    def write(*patterns, name="source", factor=1e-12):
        tensors = weights().llama()
        for tensor in tensors:
            if any(re.search(pattern, tensor) for pattern in patterns):
                tensors[tensor] *= factor
        return checkpoint(name, tensors, shards=2)

    return write


def remedy(sentence):
    """The pattern that an error proposes."""
    return re.search(r"with --keep '([^']*)'", sentence)[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_too_large_for_their_scales_are_refused(
    checkpoint, weights, precalib, recipe, tmp_path
):
    tensors = {"model.layers.0.up_proj.weight": weights(torch.float32)(16, 160) * 1e9}
    ran = precalib("quantize", checkpoint(tensors=tensors), tmp_path / "out", "--recipe", recipe)
    text = "tensor 'model.layers.0.up_proj.weight': weights are too large for float16"
    assert text in ran.sentence
    assert "--keep" in ran.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["rtn-4", "paper-3"])
def test_a_ruined_weight_is_refused_with_its_remedy(with_small, precalib, quantize, recipe):
    source = with_small(r"layers\.1\.mlp\.down_proj")
    target = source.with_name("target")
    ran = precalib("quantize", source, target, "--recipe", recipe)
    found = re.search(
        r"model-00002-of-00002\.safetensors: tensor 'model\.layers\.1\.mlp\.down_proj\.weight': "
        r"quantizing it leaves a relative error of 1 where its recipe gives (0\.\d+) and zeros 1; "
        r"its largest weight, \S+e-\d+, is too small for float16 scales; keep it with --keep",
        ran.sentence,
    )
    assert float(found[1]) < BOUND[RECIPES[recipe].layout.bits]
    assert remedy(ran.sentence) == r"^model\.layers\.1\.mlp\.down_proj$"
    assert not target.exists()
    manifest = check(source, quantize(source, "--recipe", recipe, "--keep", remedy(ran.sentence)))
    assert len(manifest.tensors) == 13


def test_all_ruined_weights_are_named_at_once(with_small, precalib, quantize):
    source = with_small(r"down_proj", r"layers\.0\.self_attn\.k_proj")
    ran = precalib("quantize", source, source.with_name("target"), "--recipe", "rtn-4")
    heading, *rest = ran.err.splitlines()
    assert ran.code == 1
    assert heading.startswith(f"precalib: {source}: 3 tensors cannot be quantized; keep them with")
    names = [re.search("tensor '(.*)\\.weight'", line)[1] for line in rest]
    assert sorted(names) == [
        "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    assert r"model\.layers\.\d+\.mlp\.down_proj" in remedy(heading)
    assert not source.with_name("target").exists()
    manifest = read_manifest(quantize(source, "--recipe", "rtn-4", "--keep", remedy(heading)))
    kept = {re.sub(r".*layers\.(\d).*\.(\w+)\.weight", r"\1 \2", n) for n in manifest.unquantized}
    # q and v with k, as vLLM computes them as one
    assert kept >= {"0 q_proj", "0 k_proj", "0 v_proj", "0 down_proj", "1 down_proj"}
    assert len(manifest.tensors) == 14 - 5


@pytest.mark.slow
def test_many_ruined_weights_have_a_short_remedy(checkpoint, weights, precalib, quantize):
    tensors = weights().llama(60)
    small = {
        n: t * 1e-12 if n.endswith("_proj.weight") and "mlp" in n else t for n, t in tensors.items()
    }
    source = checkpoint(tensors=small, config={"num_hidden_layers": 60})
    ran = precalib("quantize", source, source.with_name("target"), "--recipe", "rtn-4")
    heading, *rest = ran.err.splitlines()
    assert len(rest) == 21
    assert rest[-1] == "  and 160 more"
    assert len(remedy(heading)) < 200
    quantize(source, "--recipe", "rtn-4", "--keep", remedy(heading))


def test_a_ruined_head_is_to_be_left_out(checkpoint, weights, precalib):
    tensors = weights().llama()
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] *= 1e-20
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
    source = checkpoint(tensors=tensors, config=config)
    ran = precalib("quantize", source, source.with_name("target"), "--head", "balanced-4")
    assert "tensor 'model.embed_tokens.weight': quantizing it leaves" in ran.sentence
    assert ran.sentence.endswith("; leave out --head")
