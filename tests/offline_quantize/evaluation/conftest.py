"""A tiny model, the same one packed, a text, and a stand-in whose distributions are known."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.quantize import quantize as run_quantize
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan

TEXT = "The original is compared with the quantized model, token by token. " * 12


class Bigram:
    """A stand-in for a model: the next token's logits depend on the last token alone."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.table = logits
        text_config = SimpleNamespace(bos_token_id=0, eos_token_id=1)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)

    def forward(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids], past_key_values=None)

    __call__ = forward


@pytest.fixture
def bigram() -> type[Bigram]:
    return Bigram


@pytest.fixture(scope="session")
def source(byte_llama: Callable[..., Path]) -> Path:
    return byte_llama(hidden_size=64, intermediate_size=96, max_position_embeddings=128)


@pytest.fixture(scope="session")
def packed(source: Path) -> Path:
    target = source.with_name("packed")
    plan = make_plan(open_checkpoint(source), Options("rtn-3", {"group_size": 64}))
    run_quantize(plan, target, NullProgress(), 1, "cpu", resume=False)
    return target


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
