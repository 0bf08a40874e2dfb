"""The type that is computed in where none is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_quantize.evaluation import arithmetic, command


@pytest.mark.parametrize(
    ("information", "dtype"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_int8\n", torch.bfloat16),
        ("flags : fpu amx_bf16\nflags : fpu amx_bf16\n", torch.bfloat16),
        ("flags : fpu avx2 avx512f avx512_vnni\nbugs : bf16\n", torch.float32),
        ("processor : 0\nFeatures\t: fp asimd i8mm bf16\n", torch.bfloat16),
        ("Features : fp asimd asimddp\n", torch.float32),
        ("", torch.float32),
    ],
)
def test_type_follows_the_processor(tmp_path: Path, information: str, dtype: torch.dtype) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(information)
    assert arithmetic.default_dtype("cpu", file) is dtype
    assert arithmetic.default_dtype("cuda:0", file) is torch.bfloat16


def test_unknown_processor(tmp_path: Path) -> None:
    assert arithmetic.default_dtype("cpu", tmp_path / "missing") is torch.float32


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_type_is_said_and_can_be_chosen(
    precalib: Callable[..., Any],
    source: Path,
    packed: Path,
    text: Path,
    default: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "default_dtype", lambda _: default)
    words = ("eval", packed, "--against", source, "--text", text, "--tokens", "100")
    name = str(default).removeprefix("torch.")
    assert f"Computed in {name}." in precalib(*words).out
    assert "Computed in float16." in precalib(*words, "--dtype", "float16").out
