"""The benchmark's scripts as modules, and a random model for them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope="session")
def source(byte_llama: Callable[..., Path]) -> Path:
    return byte_llama(hidden_size=128, intermediate_size=160, max_position_embeddings=512)
