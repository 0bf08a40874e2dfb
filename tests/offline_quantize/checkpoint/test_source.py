import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.source import check_suitable, open_checkpoint
from precalib_kernels.errors import SourceError

INDEX = "model.safetensors.index.json"


def test_a_single_file(checkpoint):
    source = open_checkpoint(checkpoint())
    assert list(source.shards) == ["model.safetensors"]
    assert source.index is None
    assert source.sidecar_files == (
        "additional_chat_templates/tools.jinja",
        "code/deep/bytes.txt",
        "generation_config.json",
        "tokenizer.json",
    )
    assert source.skipped_files == ()


@pytest.mark.parametrize("index", [True, False])
def test_shards(checkpoint, weights, index):
    source = open_checkpoint(checkpoint(shards=3, index=index))
    assert len(source.shards) == 3
    assert {n for shard in source.shards.values() for n in shard} == weights().llama().keys()
    assert (source.index is not None) == index
    assert source.nbytes == sum(t.nbytes for t in weights().llama().values())


def test_what_is_not_carried_over_is_told(checkpoint):
    dead = (
        "adapter_config.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "gguf/model.Q4_K.GGUF",
        "model.fp16.safetensors.index.json",
        "model.litertlm",
        "model.mlmodel",
        "model.nemo",
        "model.tar.gz",
        "model.tflite",
        "onnx/config.json",
        "onnx/model.onnx_data",
        "onnx/model_q4.onnx_data_1",
        "optimizer.pt",
        "original/consolidated.00.pth",
        "original/params.json",
        "precalib.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "rust_model.ot",
        "tokenizer.json.partial",
        "unknown",
        "weights.npz",
    )
    root = checkpoint(files=dict.fromkeys((*dead, "vocab.txt"), b"x"))
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("")
    source = open_checkpoint(root)
    assert source.skipped_files == dead
    assert source.sidecar_files == ("vocab.txt",)


def test_links_are_followed_and_broken_ones_refused(checkpoint, tmp_path):
    """The cache of the Hugging Face hub is made of links."""
    real, linked = checkpoint(), tmp_path / "linked"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    assert open_checkpoint(linked).sidecar_files[-1] == "tokenizer.json"
    (real / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"linked/tokenizer\.json: not a file \(a broken link"):
        open_checkpoint(linked)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.pkl"])
def test_pickled_weights_are_refused_by_name(checkpoint, name):
    root = checkpoint(files={name: b"x"})
    (root / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=rf"/{name}: weights in a pickle format .* are refused; "):
        open_checkpoint(root)


def test_an_index_of_pickled_weights_is_refused(checkpoint, edit_json):
    root = checkpoint(shards=2)
    edit_json(root / INDEX, lambda index: index["weight_map"].update({"x": "a.bin"}))
    with pytest.raises(SourceError, match=r"/a\.bin: weights in a pickle format"):
        open_checkpoint(root)


def test_no_weights_no_folder_no_config(checkpoint, tmp_path):
    with pytest.raises(SourceError, match=r"nothing: no such directory; give the folder"):
        open_checkpoint(tmp_path / "nothing")
    root = checkpoint()
    with pytest.raises(SourceError, match=r"model\.safetensors: is a file; give the folder of"):
        open_checkpoint(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=rf"{root}: holds no \*\.safetensors weights; "):
        open_checkpoint(root)
    (root / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json: the file is missing; give the folder"):
        open_checkpoint(root)


def test_missing_and_truncated_shards_are_named(checkpoint):
    root = checkpoint(shards=3)
    shard = root / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(SourceError, match=rf"{shard}: not a whole safetensors file"):
        open_checkpoint(root)
    shard.unlink()
    with pytest.raises(SourceError, match=rf"{shard}: the file is missing; download"):
        open_checkpoint(root)


def test_an_index_that_lies(checkpoint, edit_json):
    root = checkpoint(shards=2)
    first = "model-00001-of-00002.safetensors"
    edit_json(root / INDEX, lambda index: index["weight_map"].update({"ghost.weight": first}))
    with pytest.raises(SourceError, match=rf"{first}: tensor 'ghost\.weight' is named by {INDEX}"):
        open_checkpoint(root)


def test_a_tensor_in_two_files(checkpoint):
    root = checkpoint(shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    both = load_file(root / first) | {"lm_head.weight": load_file(root / second)["lm_head.weight"]}
    save_file(both, root / first)
    for named in (True, False):
        source = open_checkpoint(root)
        assert ("lm_head.weight" in source.shards[second]) == named
        assert ("lm_head.weight" in source.shards[first]) != named
        wrong = first if named else second
        text = f"'lm_head.weight' of {wrong} also in another file with equal values, taken once"
        assert source.notes == (text,)
        (root / INDEX).unlink(missing_ok=True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("other", [torch.ones(8, 128), torch.zeros(8, 128).bfloat16()])
def test_a_tensor_with_other_values_in_another_file(checkpoint, index, other):
    root = checkpoint(shards=2)
    first = "model-00001-of-00002.safetensors"
    save_file(load_file(root / first) | {"lm_head.weight": other}, root / first)
    if not index:
        (root / INDEX).unlink()
    kept, further = ("00002", "00001") if index else ("00001", "00002")
    named = f", which {INDEX} names," if index else ""
    with pytest.raises(
        SourceError,
        match=rf"tensor 'lm_head\.weight' is in model-{kept}-of-00002\.safetensors{named} and with "
        rf"other values in model-{further}-.*; download the checkpoint again$",
    ):
        open_checkpoint(root)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "model-1.safetensors"}}', "{", "{}"])
def test_a_stale_index_beside_a_whole_file(checkpoint, index, quantize, contents):
    """transformers takes the single file; vLLM would take the index, so the output has none."""
    root = checkpoint()
    (root / INDEX).write_text(index)
    source = open_checkpoint(root)
    assert list(source.shards) == ["model.safetensors"]
    assert source.index is None
    assert source.skipped_files == (INDEX,)
    assert source.notes == (
        f"model.safetensors is taken and {INDEX}, which names other files, left out, as "
        "transformers does",
    )
    assert INDEX not in contents(quantize(root, "--recipe", "rtn-4"))


def test_an_index_that_names_the_single_file(checkpoint, weights):
    root = checkpoint()
    weight_map = dict.fromkeys(weights().llama(), "model.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    source = open_checkpoint(root)
    assert source.index is not None
    assert (source.notes, source.skipped_files) == ((), ())


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "tensor 'a' is said to be in 1, which is not a file of"),
        ('{"weight_map": {"a": ["b"]}}', "tensor 'a' is said to be in"),
        ('{"weight_map": {"a": ""}}', "tensor 'a' is said to be in"),
        ('{"weight_map": {"a": ".."}}', "tensor 'a' is said to be in"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "tensor 'a' is said to be in"),
        ('{"weight_map": {"a": "b\\u0000.safetensors"}}', "tensor 'a' is said to be in"),
    ],
)
def test_a_damaged_index(checkpoint, index, text):
    root = checkpoint(shards=2)
    (root / INDEX).write_text(index)
    with pytest.raises(SourceError, match=rf"{INDEX}: {text}.*; download"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"quantization_config": {"bits": 4}}, r"already quantized \(unnamed method\)"),
        ({"quantization_config": "fp8"}, r"already quantized \(unnamed method\)"),
        ({"compression_config": {"quant_method": "x"}}, r"already quantized \(x\)"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            r"already quantized \(fp8\)",
        ),
        (
            {"quantization_config": {"quant_method": "precalib"}},
            r"already quantized \(precalib\).* first with 'precalib dequantize'",
        ),
        ({"model_type": "gpt2"}, "models of type 'gpt2' store linear weights transposed"),
        ({"text_config": {"model_type": "gpt2"}}, "models of type 'gpt2' store linear weights"),
    ],
)
def test_unsuitable_sources(checkpoint, config, text):
    source = open_checkpoint(checkpoint(config=config))
    with pytest.raises(SourceError, match=rf"/source/config\.json: {text}"):
        check_suitable(source)


def test_packed_tensors_without_a_word_in_the_configuration(checkpoint, weights):
    name = "model.layers.0.self_attn.q_proj.qweight"
    source = open_checkpoint(checkpoint(tensors={name: torch.zeros(4, 4, dtype=torch.int32)}))
    with pytest.raises(SourceError, match=rf"model\.safetensors: tensor '{name}' is already quan"):
        check_suitable(source)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_suitable_sources(checkpoint, config):
    check_suitable(open_checkpoint(checkpoint(config=config)))


def test_the_language_model_of_a_larger_one(checkpoint):
    config = {"thinker_config": {"text_config": {"a": 1}}, "vision_config": {"a": 2}}
    assert open_checkpoint(checkpoint(config=config)).text_config == {"a": 1}


def test_fingerprints_tell_sources_apart(checkpoint, edit_json):
    first, second = checkpoint("first"), checkpoint("second")
    one, two = open_checkpoint(first).fingerprint(), open_checkpoint(second).fingerprint()
    weights = "model.safetensors"
    assert one[weights].pop("modified") != two[weights].pop("modified")
    assert one == two
    edit_json(second / "config.json", lambda config: config.update(vocab_size=1))
    three = open_checkpoint(second).fingerprint()
    assert three["config.json"] != one["config.json"]
