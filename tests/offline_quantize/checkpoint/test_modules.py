"""Embedding models of sentence-transformers: what follows the model is carried over whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.modules import module_folders
from offline_quantize.checkpoint.source import open_checkpoint
from precalib_kernels.errors import SourceError

KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(KINDS.items())
]
CARRIED = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")


@pytest.fixture
def embedder(checkpoint):
    """A model with pooling, a projection of 128 to 64, and a normalization without files."""
    dense = {"in_features": 128, "out_features": 64, "bias": False}
    files = {
        "modules.json": json.dumps(MODULES).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
        "2_Dense/config.json": json.dumps(dense).encode(),
        "2_Dense/notes.weird": b"x",
        "2_Dense/training.bin": b"x",
        "9_Other/model.safetensors": b"x",
    }
    root = checkpoint(files=files)
    save_file({"linear.weight": torch.randn(64, 128)}, root / "2_Dense" / "model.safetensors")
    return root


def test_folders_are_carried_whole_and_the_rest_is_told(embedder, precalib, tmp_path, contents):
    ran = precalib("quantize", embedder, tmp_path / "packed", "--recipe", "rtn-4")
    assert ran.code == 0, ran.err
    before, after = contents(embedder), contents(tmp_path / "packed")
    for name in (*CARRIED, "2_Dense/notes.weird", "modules.json"):
        assert after[name] == before[name]
    left = "Left out (a server needs none of them): 2_Dense/training.bin, 9_Other/model.safetensors"
    assert f"{left}\n" in ran.out
    assert after.keys() - before.keys() == {"precalib.json", "README.md"}
    assert precalib("verify", tmp_path / "packed", "--against", embedder).code == 0
    assert precalib("dequantize", tmp_path / "packed", tmp_path / "back").code == 0
    assert contents(tmp_path / "back").keys() == after.keys() - {"precalib.json", "README.md"}


def test_a_damaged_projection_is_found(embedder, quantize, precalib):
    packed = quantize(embedder, "--recipe", "rtn-4")
    path = packed / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert "2_Dense/model.safetensors: its sha256 is not" in precalib("verify", packed).err


def test_vllm_reads_the_projection(embedder, quantize, monkeypatch):
    from types import SimpleNamespace

    from vllm.model_executor.models.adapters import _load_st_projector

    packed = quantize(embedder, "--recipe", "rtn-4")
    rows = load_file(embedder / "2_Dense" / "model.safetensors")["linear.weight"]
    config = SimpleNamespace(model=str(packed), revision=None, head_dtype=torch.float32)
    (linear,) = _load_st_projector(config)
    assert torch.equal(linear.weight, rows)
    shutil.rmtree(packed / "2_Dense")
    assert not _load_st_projector(SimpleNamespace(**vars(config) | {"model": f"{packed}/."}))


@pytest.mark.parametrize("pickled", [True, False])
def test_a_projection_without_safetensors_is_refused(embedder, precalib, tmp_path, pickled):
    dense = embedder / "2_Dense" / "model.safetensors"
    dense.rename(dense.with_name("pytorch_model.bin")) if pickled else dense.unlink()
    sentence = precalib("quantize", embedder, tmp_path / "packed").sentence
    assert "/2_Dense: this part of the model has no *.safetensors weights, and" in sentence
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ("{", "not valid JSON"),
        ("7", "not a list of modules"),
        ('["2_Dense"]', "has no folder of this checkpoint"),
        ('[{"path": 3}]', "has no folder of this checkpoint"),
        ('[{"path": "../../etc"}]', "has no folder of this checkpoint"),
        ('[{"path": "/etc"}]', "has no folder of this checkpoint"),
        ('[{"path": "a\\u0000"}]', "has no folder of this checkpoint"),
    ],
)
def test_damaged_lists_of_modules(embedder, modules, text):
    (embedder / "modules.json").write_text(modules)
    with pytest.raises(SourceError, match=rf"modules\.json: .*{text}"):
        open_checkpoint(embedder)


def test_lists_of_modules(embedder, checkpoint):
    assert module_folders(embedder) == ("1_Pooling", "2_Dense", "3_Normalize")
    assert module_folders(checkpoint("plain")) == ()
    (embedder / "modules.json").write_text(json.dumps({"modules": MODULES[1:2]}))
    assert module_folders(embedder) == ("1_Pooling",)
