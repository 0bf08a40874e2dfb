"""Peers that quantize whole models: what is listed, undone, counted and written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

Load = Callable[[str], ModuleType]


def test_list_is_what_can_be_made(load: Load, monkeypatch: Any, capsys: Any) -> None:
    outside = load("outside_peers")
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["outside_peers.py", "--list"])
    outside.main()
    assert json.loads(capsys.readouterr().out) == []
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: name == "llmcompressor")
    calibrated = {peer.method: peer.calibrated for peer in outside.available(None)}
    assert calibrated == {"llm-compressor": False, "GPTQ": True, "AWQ": True}
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: name == "turbopress")
    calibrated = {peer.method: peer.calibrated for peer in outside.available(None)}
    assert calibrated == {"turbopress": True, "turbopress, no data": False}


def test_grids_that_are_found_again_are_marked(load: Load) -> None:
    peers = load("outside_peers").available(Path("libllama.so"))
    for peer in peers:
        if peer.method.startswith("GGUF"):
            assert bool(peer.note) == (peer.method == "GGUF")
    calibrated = {peer.method: peer.calibrated for peer in peers if "GGUF" in peer.method}
    assert calibrated == {
        "GGUF": False,
        "GGUF, inputs shuffled": False,
        "GGUF, importance matrix, inputs shuffled": True,
    }


def test_nothing_of_that_name(load: Load, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["outside_peers.py", "source", "folder", "GPTQ", "9 bits"])
    with pytest.raises(SystemExit, match="GPTQ 9 bits cannot be made here; --list shows what can"):
        load("outside_peers").main()


def test_written_whole(load: Load, tmp_path: Path) -> None:
    load("outside_peers").write({"a": torch.ones(2)}, {"a": 3}, 12.34, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["stored_bits"]) == {"a": 3}
    method = load("methods").Method("m", "v", lambda _: (), made=file)
    assert method.cpu_seconds(99) == 12.3
    assert load("methods").Method("m", "v", lambda _: ()).cpu_seconds(99) == 99


@pytest.mark.parametrize("shuffled", [False, True])
def test_gguf_without_quantizing_is_the_model(
    load: Load, source: Path, monkeypatch: Any, shuffled: bool
) -> None:
    peers = load("gguf_peers")
    given = {}

    def keep(_: Path, plain: Path, packed: Path, kind: str, matrix: Any) -> None:
        from gguf import GGUFReader

        assert (kind, matrix) == ("Q4_K_M", {})
        given.update({tensor.name: tensor.data.copy() for tensor in GGUFReader(plain).tensors})
        plain.rename(packed)

    monkeypatch.setattr(peers, "quantize", keep)
    method = peers.SHUFFLED if shuffled else peers.AS_MADE
    found, bits = peers.make(Path("libllama.so"), method, "Q4_K_M", source)
    original = load_file(source / "model.safetensors")
    linear = {name for name in original if name.endswith("_proj.weight")}
    assert set(found) == set(bits) == linear
    assert len(linear) == 14
    for name in linear:
        assert torch.equal(found[name], original[name])
        assert bits[name] == 32 * original[name].numel()
    down = torch.from_numpy(given["blk.1.ffn_down.weight"])
    weight = original["model.layers.1.mlp.down_proj.weight"].float()
    assert torch.equal(down.reshape(weight.shape), weight) != shuffled
    assert down.shape == ((16, 1280) if shuffled else (128, 160))  # 5 blocks in 8 rows
    embedding = given["token_embd.weight"]
    assert embedding.shape == (256, 128)  # enough for a file


def test_importance_goes_with_its_inputs(
    load: Load, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The mean square of the first weight's inputs, and each value where its input is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peers = load("gguf_peers")
    monkeypatch.setattr(peers, "WINDOWS", 2)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(1500)))
    found = peers.mean_squares(source, text)
    assert len(found) == 14
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    windows = load("calibration_text").evenly_spread(
        AutoTokenizer.from_pretrained(source), text.read_text(), 2
    )
    with torch.inference_mode():
        embedded = model.model.embed_tokens(torch.tensor(windows))
        inputs = model.model.layers[0].input_layernorm(embedded).double()
    expected = inputs.square().mean((0, 1)).float()
    torch.testing.assert_close(found["model.layers.0.self_attn.k_proj.weight"], expected)

    weight = torch.arange(8.0)[:, None] + torch.arange(160.0) / 1000
    (row,) = peers.shuffle(weight)
    importance = peers.shuffle_row(torch.arange(160.0) / 1000, 8)
    torch.testing.assert_close(row - row.floor(), importance)
    assert len(importance) == 5 * 256
    with pytest.raises(ValueError, match=r"\[12, 160\] cannot be cut into blocks of 256"):
        peers.shuffle(torch.zeros(12, 160))


def test_gguf_of_another_architecture(load: Load, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no GGUF file is written for a gpt2"):
        load("gguf_peers").gguf_names(tmp_path, [])


def test_gemma_has_names_in_gguf(load: Load, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text", "num_hidden_layers": 2}')
    stem = "model.layers.1"
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        f"{stem}.self_attn.q_norm.weight": "blk.1.attn_q_norm.weight",
        f"{stem}.pre_feedforward_layernorm.weight": "blk.1.ffn_norm.weight",
        f"{stem}.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }
    assert load("gguf_peers").gguf_names(tmp_path, list(names)) == names
    with pytest.raises(ValueError, match=r"odd.weight: GGUF has no name .* of a gemma3"):
        load("gguf_peers").gguf_names(tmp_path, ["odd.weight"])


def test_adpq_counts_codes_scales_and_positions(load: Load) -> None:
    """10 groups of 128 at 3 bits, two float16 scales each, 5 positions of 7 bits in every group."""
    bits = load("adpq_peers").stored_bits(1280, 3, 2 * 10, 5 * 10)
    assert bits / 1280 == 3 + (32 + 5 * 7) / 128


def test_schemes_have_names(load: Load) -> None:
    peers = load("llmcompressor_peers")
    assert peers.Scheme("GPTQ", 3, 64).variant == "3 bits, g 64, asymmetric"
    assert peers.Scheme("GPTQ", 3, 64, windows=32).variant.endswith(", 32 windows")


def test_rounded_norms_are_no_change(load: Load) -> None:
    """Norms that multiply by 1 + w lose bits on the way to plain ones and back, and no more."""
    same = load("llmcompressor_peers").same_norm
    before = torch.tensor([0.0123, -0.4, 12.5, 0.0]).bfloat16()
    rounded = ((1 + before.float()).bfloat16().float() - 1).bfloat16()
    assert not torch.equal(rounded, before)
    assert same(before, before)
    assert same(rounded, before)
    assert not same(rounded * 1.1, before)
