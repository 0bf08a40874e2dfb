"""`--embeddings`: packed input embeddings, stored once where a head shares them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import for_head

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
TIED = {**CONFIG, "tie_word_embeddings": True}
EMBEDDINGS = "model.embed_tokens"


@pytest.fixture
def tied(checkpoint, weights):
    def write(name="source", config=TIED, **options):
        tensors = weights().llama()
        del tensors["lm_head.weight"]
        return checkpoint(name, tensors, config=config, **options)

    return write


def all_tensors(directory: Path):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("head", [(), ("--head", "balanced-5")])
def test_a_shared_head_is_stored_once(tied, quantize, precalib, tmp_path, shards, head):
    source = tied(shards=shards)
    target = quantize(source, "--recipe", "rtn-4", "--embeddings", "balanced-5", *head)
    packed, manifest = open_packed(target), read_manifest(target)
    assert packed.config.modules[EMBEDDINGS] == "balanced-5 (head)"
    assert packed.config.tied == {"lm_head": EMBEDDINGS}
    assert packed.config.recipe.endswith("--embeddings balanced-5")
    assert packed.files.config["tie_word_embeddings"] is True
    assert manifest.run.embeddings == "balanced-5"
    assert manifest.tensors[EMBEDDINGS].origin == "model.embed_tokens.weight"
    assert not [name for name in packed.locations if "lm_head" in name]
    assert "model.embed_tokens.weight" not in packed.locations
    assert precalib("verify", target, "--against", source).code == 0
    assert EMBEDDINGS in precalib("inspect", target).out
    back = tmp_path / "back"
    assert precalib("dequantize", target, back, "--dtype", "float32").code == 0
    tensors = all_tensors(back)
    assert torch.equal(tensors["model.embed_tokens.weight"], packed.weight(EMBEDDINGS))
    assert "lm_head.weight" not in tensors
    config = json.loads((back / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config


def test_the_bytes_are_those_of_a_head_by_the_same_recipe(tied, quantize):
    source = tied()
    target = quantize(source, "--recipe", "rtn-4", "--embeddings", "balanced-4")
    weight = all_tensors(source)["model.embed_tokens.weight"]
    expected = encode(weight, for_head("balanced-4")[1], "test").tensors
    found = all_tensors(target)
    assert all(torch.equal(found[f"{EMBEDDINGS}.{k}"], v) for k, v in expected.items())


def test_a_head_by_another_recipe_has_tensors_of_its_own(tied, quantize, precalib):
    source = tied()
    target = quantize(source, "--embeddings", "rtn-4", "--head", "balanced-5")
    packed = open_packed(target)
    assert packed.config.tied == {}
    assert packed.config.modules["lm_head"] == "balanced-5 (head)"
    assert packed.config.modules[EMBEDDINGS] == "rtn-4"
    assert packed.files.config["tie_word_embeddings"] is False
    assert precalib("verify", target, "--against", source).code == 0


def test_embeddings_of_their_own_leave_the_head_alone(checkpoint, quantize, precalib):
    source = checkpoint(config={**CONFIG, "tie_word_embeddings": False})
    target = quantize(source, "--embeddings", "rtn-4")
    packed = open_packed(target)
    assert packed.config.modules[EMBEDDINGS] == "rtn-4"
    assert packed.config.tied == {}
    assert "lm_head.weight" in packed.locations
    assert packed.files.config["tie_word_embeddings"] is False
    assert precalib("verify", target, "--against", source).code == 0


def test_without_the_option_nothing_changes(tied, quantize):
    target = quantize(tied(), "--recipe", "rtn-4")
    assert '"embeddings"' not in (target / "precalib.json").read_text()
    quantization = json.loads((target / "config.json").read_text())["quantization_config"]
    assert "tied" not in quantization


def test_a_run_with_other_embeddings_is_another_run(tied, quantize, precalib):
    source = tied()
    target = quantize(source, "--embeddings", "rtn-4")
    again = ("quantize", source, target, "--resume")
    assert "was finished before" in precalib(*again, "--embeddings", "rtn-4").out
    assert "has another 'embeddings'" in precalib(*again).sentence


def test_embeddings_that_cannot_be_packed(tied, checkpoint, weights, precalib, tmp_path):
    def refused(source, *options):
        ran = precalib("quantize", source, tmp_path / "none", "--embeddings", "rtn-4", *options)
        assert not (tmp_path / "none").exists()
        return ran.sentence

    other = refused(tied("other", {**TIED, "model_type": "gemma2"}))
    assert "vLLM takes no packed embeddings for models of type 'gemma2'; leave out" in other
    kept = refused(tied("kept"), "--keep", "embed_tokens")
    assert "holds no input embeddings 'model.embed_tokens.weight' that can be packed" in kept
    tensors = weights().llama() | {"model.embed_tokens.weight": weights()(8, 100)}
    assert "that can be packed; leave out --embeddings" in refused(checkpoint("odd", tensors))
    whole = tensors | {"model.embed_tokens.weight": torch.zeros(8, 128, dtype=torch.int8)}
    assert "has type I8; only" in refused(checkpoint("whole", whole))


def test_embeddings_of_two_bits_are_warned_of(tied, precalib, tmp_path):
    result = precalib("quantize", tied(), tmp_path / "t", "--embeddings", "balanced-2")
    assert "Note: model.embed_tokens gets 2-bit codes" in result.out
    assert "prefer --embeddings balanced-4" in result.out


def test_large_embeddings_are_pointed_at(checkpoint, weights, precalib, tmp_path):
    tensors = weights().llama() | {"model.embed_tokens.weight": weights()(1024, 128)}
    del tensors["lm_head.weight"]
    source = checkpoint("large", tensors, config=TIED)
    text = (
        r"Note: embeddings are (\d+)% of the weights .*--embeddings balanced-5 would save (.*)\.\n"
    )
    plain = precalib("quantize", source, tmp_path / "plain", "--recipe", "rtn-4")
    found = re.search(text, plain.out)
    assert found
    assert int(found[1]) == round(100 * 1024 * 128 / sum(t.numel() for t in tensors.values()))
    packed = precalib("quantize", source, tmp_path / "packed", "--embeddings", "balanced-5")
    assert "embeddings are" not in packed.out
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "packed")]
    assert abs(sizes[0] - sizes[1] - 1000 * float(found[2].split()[0])) < 0.1 * sizes[0]
    small = precalib("quantize", checkpoint("small", config=CONFIG), tmp_path / "small")
    assert "embeddings are" not in small.out


def test_a_stored_copy_of_the_embeddings_stays_a_head_of_its_own(checkpoint, quantize, precalib):
    source = checkpoint(config=TIED)  # tied by its configuration, and yet with a head
    packed = open_packed(quantize(source, "--embeddings", "rtn-4"))
    assert packed.config.tied == {}
    assert "lm_head.weight" in packed.locations
    assert packed.files.config["tie_word_embeddings"] is False


def test_embeddings_narrower_than_a_group_stay(checkpoint, weights, precalib, tmp_path):
    tensors = weights().llama() | {"model.embed_tokens.weight": weights()(8, 64)}
    del tensors["lm_head.weight"]
    source, target = checkpoint("narrow", tensors, config=TIED), tmp_path / "t"
    head = precalib("quantize", source, target, "--head", "balanced-4")
    assert "tensor 'model.embed_tokens.weight': " in head.sentence
    assert head.sentence.endswith("; leave out --head")
    ran = precalib("quantize", source, target, "--embeddings", "balanced-4", "--head", "balanced-4")
    assert ran.code == 0
    packed = open_packed(target)
    assert packed.config.tied == {}
    assert "model.embed_tokens.weight" in packed.locations
    assert packed.files.config["tie_word_embeddings"] is True
