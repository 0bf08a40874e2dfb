"""`--head`: a packed output head, also where a model shares it with its embeddings."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import RECIPES, for_head
from offline_quantize.units import size
from precalib_kernels.format import reference

TIED = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.fixture
def tied(checkpoint, weights):
    def write(name="source", config=TIED, **options):
        tensors = weights().llama()
        del tensors["lm_head.weight"]
        return checkpoint(name, tensors, config=config, **options)

    return write


def error(weight, recipe):
    encoded = encode(weight, recipe, "test")
    values = reference.dequantize(encoded.tensors, recipe.layout, weight.shape[1])
    return float((values - weight).square().sum())


def test_columns_that_all_rows_share_are_left_to_the_salient_weights():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(300, 256)
    alone = error(weight, RECIPES["balanced-4"])
    weight[:, [5, 150]] += 0.6
    assert error(weight, for_head("balanced-4")[1]) < 1.5 * alone
    assert error(weight, RECIPES["balanced-4"]) > 5 * alone


def test_a_recipe_for_heads_has_no_column_scale():
    assert for_head("rtn-4") == ("rtn-4", RECIPES["rtn-4"])
    label, recipe = for_head("balanced-5")
    assert label == "balanced-5 (head)"
    assert recipe.layout == dataclasses.replace(RECIPES["balanced-5"].layout, column_scale=False)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_head_gets_tensors_of_its_own(tied, quantize, precalib, tmp_path, shards):
    source = tied(shards=shards)
    target = quantize(source, "--recipe", "rtn-4", "--head", "balanced-5")
    packed, manifest = open_packed(target), read_manifest(target)
    assert packed.config.recipe == "rtn-4 --head balanced-5"
    assert packed.config.modules["lm_head"] == "balanced-5 (head)"
    assert packed.files.config["tie_word_embeddings"] is False
    assert manifest.tensors["lm_head"].origin == "model.embed_tokens.weight"
    assert manifest.unquantized["model.embed_tokens.weight"] == "embedding"
    location = packed.locations["model.embed_tokens.weight"]
    embeddings = load_file(location.path)["model.embed_tokens.weight"]
    assert location.entry.shape == packed.shape("lm_head")
    error = (packed.weight("lm_head") - embeddings.float()).square().sum()
    assert error < 0.005 * embeddings.float().square().sum()
    if shards > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["lm_head.qweight"] == location.path.name
    assert precalib("verify", target, "--against", source).code == 0
    assert "lm_head" in precalib("inspect", target).out
    back = tmp_path / "back"
    assert precalib("dequantize", target, back, "--dtype", "float32").code == 0
    tensors = {k: v for path in back.glob("*.safetensors") for k, v in load_file(path).items()}
    assert torch.equal(tensors["lm_head.weight"], packed.weight("lm_head"))


def test_sizes_tell_of_the_files(tied, quantize, precalib):
    """The embeddings stay; what the head is made from is no tensor of the source by itself."""
    source = tied()
    target = quantize(source, "--recipe", "rtn-4", "--head", "rtn-4")
    manifest = read_manifest(target)
    before = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    after = sum(t.nbytes for t in load_file(target / "model.safetensors").values())
    assert (manifest.bytes_before, manifest.bytes_after) == (before, after)
    shown = precalib("inspect", target).out
    assert f"All tensors {size(before)} → {size(after)}: " in shown
    totals = json.loads(precalib("inspect", target, "--json").out)["totals"]
    assert (totals["bytes_before"], totals["bytes_after"]) == (before, after)


def test_a_head_of_its_own_is_packed_where_it_is(checkpoint, weights, quantize, precalib):
    source = checkpoint()
    target = quantize(source, "--recipe", "rtn-4", "--head", "rtn-3")
    packed = open_packed(target)
    assert packed.config.modules["lm_head"] == "rtn-3"
    assert read_manifest(target).tensors["lm_head"].origin == "lm_head.weight"
    assert "lm_head.weight" not in packed.locations
    assert precalib("verify", target, "--against", source).code == 0


def test_an_override_may_choose_for_the_head_and_the_target_counts_it(tied, quantize):
    source = tied()
    target = quantize(source, "--recipe", "rtn-4", "--head", "rtn-4", "--override", "lm_head=rtn-3")
    assert open_packed(target).config.modules["lm_head"] == "rtn-3"
    target = quantize(source, "--target-bits", 4.9, "--head", "balanced-5", target="b")
    assert open_packed(target).bits_per_weight <= 4.9
    assert open_packed(target).config.modules["lm_head"] == "balanced-5 (head)"


@pytest.mark.parametrize(
    ("embeddings", "head"),
    [
        ("model.language_model.embed_tokens", "lm_head"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
        ("transformer.word_embeddings", "lm_head"),
    ],
)
def test_a_tied_head_of_other_models(tied, checkpoint, weights, quantize, embeddings, head):
    tensors = weights().llama()
    del tensors["lm_head.weight"]
    tensors[f"{embeddings}.weight"] = tensors.pop("model.embed_tokens.weight")
    source = checkpoint("nested", tensors, config={"text_config": TIED})
    packed = open_packed(quantize(source, "--recipe", "rtn-4", "--head", "rtn-4"))
    assert packed.config.modules[head] == "rtn-4"
    assert packed.files.config["tie_word_embeddings"] is False
    assert packed.files.config["text_config"]["tie_word_embeddings"] is False


def test_a_run_with_another_head_is_another_run(tied, quantize, precalib):
    source = tied()
    target = quantize(source, "--recipe", "rtn-4", "--head", "rtn-4")
    again = ("quantize", source, target, "--recipe", "rtn-4", "--resume")
    assert "was finished before" in precalib(*again, "--head", "rtn-4").out
    assert "has another 'head'" in precalib(*again).sentence


def test_heads_that_cannot_be_packed(tied, checkpoint, weights, precalib, tmp_path):
    def refused(source, *options):
        ran = precalib("quantize", source, tmp_path / "none", "--head", "rtn-4", *options)
        assert not (tmp_path / "none").exists()
        return ran.sentence

    untied = refused(tied("untied", {**TIED, "tie_word_embeddings": False}))
    assert "untied: holds no output head, and no embeddings of a language model" in untied
    cohere = refused(tied("cohere", {**TIED, "architectures": ["Cohere2ForCausalLM"]}))
    assert "vLLM serves Cohere2ForCausalLM with an unquantized output head only" in cohere
    vision = refused(tied("vision", {"text_config": {**TIED, "model_type": "cohere2"}}))
    assert "vLLM serves Cohere2ForCausalLM with an unquantized output head only" in vision
    kept = refused(checkpoint("kept"), "--keep", "lm_head")
    assert kept.endswith("the head 'lm_head.weight' is kept (--keep); leave out --head")
    tensors = weights().llama() | {"lm_head.weight": weights()(8, 100)}
    odd = refused(checkpoint("odd", tensors))
    assert "is kept (input size 100 is not a multiple of 32); leave out --head" in odd
    del tensors["lm_head.weight"]
    scorer = refused(checkpoint("scorer", tensors | {"score.weight": weights()(2, 128)}))
    assert "the head 'score.weight' is kept (output head)" in scorer
    thin = refused(checkpoint("thin", tensors | {"model.embed_tokens.weight": weights()(8, 100)}))
    assert "'model.embed_tokens.weight' has input size 100, which is not a multiple of 32" in thin
    whole = tensors | {"model.embed_tokens.weight": torch.zeros(8, 128, dtype=torch.int8)}
    assert "has type I8; only" in refused(checkpoint("whole", whole))
    assert "unknown recipe 'none'" in precalib("quantize", tied(), "x", "--head", "none").sentence


def test_a_head_of_two_bits_is_warned_of(tied, precalib, tmp_path):
    source, target = tied(), tmp_path / "t"
    for head, warned in (("balanced-3", False), ("balanced-2", True)):
        for more in (["--dry-run"], []):
            result = precalib("quantize", source, target / head, "--head", head, *more)
            assert ("Note: lm_head gets 2-bit codes" in result.out) == warned
    assert open_packed(target / "balanced-2").config.modules["lm_head"] == "balanced-2 (head)"
