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


def test_grids_that_are_found_again_are_marked(load: Load) -> None:
    peers = load("outside_peers").available(Path("libllama.so"))
    for peer in peers:
        if peer.method.startswith("GGUF"):
            assert bool(peer.note) == (peer.method == "GGUF")
    assert {"GGUF", "GGUF, inputs shuffled"} <= {peer.method for peer in peers}


def test_nothing_of_that_name(load: Load, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["outside_peers.py", "source", "folder", "GPTQ", "9 bits"])
    with pytest.raises(SystemExit, match="GPTQ 9 bits cannot be made here; --list shows what can"):
        load("outside_peers").main()


def test_written_whole(load: Load, tmp_path: Path) -> None:
    load("outside_peers").write({"a": torch.ones(2)}, {"a": 3}, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["stored_bits"]) == {"a": 3}


@pytest.mark.parametrize("shuffled", [False, True])
def test_gguf_without_quantizing_is_the_model(
    load: Load, source: Path, monkeypatch: Any, shuffled: bool
) -> None:
    peers = load("gguf_peers")
    given = {}

    def keep(_: Path, plain: Path, packed: Path, kind: str) -> None:
        from gguf import GGUFReader

        assert kind == "Q4_K_M"
        given.update({tensor.name: tensor.data.copy() for tensor in GGUFReader(plain).tensors})
        plain.rename(packed)

    monkeypatch.setattr(peers, "quantize", keep)
    found, bits = peers.make(Path("libllama.so"), shuffled, "Q4_K_M", source)
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
    assert down.shape == ((80, 256) if shuffled else (128, 160))


def test_adpq_counts_codes_scales_and_positions(load: Load) -> None:
    """10 groups of 128 at 3 bits, two float16 scales each, 5 positions of 7 bits in every group."""
    bits = load("adpq_peers").stored_bits(1280, 3, 2 * 10, 5 * 10)
    assert bits / 1280 == 3 + (32 + 5 * 7) / 128


def test_calibration_windows(load: Load) -> None:
    """Evenly spread, whole, and refused when the text is too short."""
    peers = load("llmcompressor_peers")
    window = peers.WINDOW
    rows = peers.evenly_spread(list(range(8 * window + 3)), 4)
    assert [row[0] for row in rows] == [0, 2 * window, 4 * window, 6 * window]
    assert all(row == list(range(row[0], row[0] + window)) for row in rows)
    with pytest.raises(ValueError, match="needs 2048 tokens, the text has 2047"):
        peers.evenly_spread(list(range(4 * window - 1)), 4)
    assert peers.Scheme("GPTQ", 3, 64).variant == "3 bits, g 64, asymmetric"
    assert peers.Scheme("GPTQ", 3, 64, windows=32).variant.endswith(", 32 windows")
