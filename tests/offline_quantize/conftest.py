"""Small synthetic checkpoints, the command run in this process, and folders compared."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offline_quantize.cli import main as cli

HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 128, 64, 160, 48  # 160 = 128 + a ragged group of 32
SIDE_FILES = {
    "tokenizer.json": b'{"model": "\xc3\xa9"}',
    "generation_config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "code/deep/bytes.txt": bytes(range(256)),
}


@dataclasses.dataclass
class Weights:
    """Random tensors, the same ones for the same order of calls."""

    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        noise = torch.randn(*shape, generator=self.generator)
        return (noise * 0.02 * (1 + noise.square() / 4)).to(self.dtype)  # heavier tails than Gauss

    def llama(self, layers: int = 2) -> dict[str, Tensor]:
        tensors = {"model.embed_tokens.weight": self(VOCABULARY, HIDDEN)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            shapes = {
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (KEY_VALUE, HIDDEN),
                "self_attn.v_proj": (KEY_VALUE, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }
            for name, shape in shapes.items():
                tensors[f"{prefix}.{name}.weight"] = self(*shape)
            tensors[f"{prefix}.self_attn.q_proj.bias"] = self(HIDDEN)
            tensors[f"{prefix}.input_layernorm.weight"] = self(HIDDEN)
        return tensors | {"model.norm.weight": self(HIDDEN), "lm_head.weight": self(8, HIDDEN)}


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here processes are killed, not machines; flushing every small file would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def weights() -> type[Weights]:
    return Weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint: by default a two-layer llama in one file, with side files."""

    def write(
        name: str = "source",
        tensors: Mapping[str, Tensor] | None = None,
        *,
        shards: int = 1,
        index: bool = True,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] = SIDE_FILES,
    ) -> Path:
        root = tmp_path / name
        root.mkdir()
        tensors = Weights().llama() if tensors is None else tensors
        config = {"model_type": "llama", "num_hidden_layers": 2} if config is None else config
        (root / "config.json").write_text(json.dumps(config))
        for file, data in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(data)
        if shards == 1:
            save_file(dict(tensors), root / "model.safetensors", metadata={"format": "pt"})
            return root
        weight_map = {}
        names = list(tensors)
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
            save_file({n: tensors[n] for n in part}, root / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if index:
            text = {"metadata": {"total_size": 1, "by": "test"}, "weight_map": weight_map}
            (root / "model.safetensors.index.json").write_text(json.dumps(text))
        return root

    return write


@dataclasses.dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line of an error."""
        lines = self.err.splitlines()
        assert self.code == 1, self
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def precalib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """The command `precalib`, run in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["precalib", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def quantize(precalib: Callable[..., Ran], tmp_path: Path) -> Callable[..., Path]:
    """`precalib quantize` that must succeed; returns the target."""

    def run(source: Path, *options: object, target: str = "target") -> Path:
        ran = precalib("quantize", source, tmp_path / target, *options)
        assert ran.code == 0, ran.err
        assert ran.err == ""
        return tmp_path / target

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """Digest of every file of a folder, by name."""

    def digests(root: Path) -> dict[str, str]:
        return {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return digests


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Changes a JSON file in place."""

    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return edit
