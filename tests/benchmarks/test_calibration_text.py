"""Windows for the peers that calibrate."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


class Words:
    """A tokenizer: a number is a token; `begin`: what it puts before a text."""

    bos_token_id = 9999

    def __init__(self, begin: list[int]) -> None:
        self.begin = begin

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        tokens = [int(word) for word in text.split()]
        return SimpleNamespace(input_ids=self.begin * add_special_tokens + tokens)


@pytest.mark.parametrize("begin", [[], [9999]])
def test_windows_are_whole_and_evenly_spread(load: Load, begin: list[int]) -> None:
    text = load("calibration_text")
    size = text.WINDOW - len(begin)
    words = " ".join(map(str, range(8 * size + 3)))
    rows = text.evenly_spread(Words(begin), words, 4)
    starts = [0, 2 * size, 4 * size, 6 * size]
    assert rows == [begin + list(range(start, start + size)) for start in starts]
    short = " ".join(map(str, range(4 * size - 1)))
    with pytest.raises(ValueError, match=f"needs {4 * size} tokens, the text has {4 * size - 1}"):
        text.evenly_spread(Words(begin), short, 4)


def test_ends_are_no_begin_token(load: Load, source: Path) -> None:
    from transformers import AutoTokenizer

    text = load("calibration_text")
    assert text.evenly_spread(AutoTokenizer.from_pretrained(source), "a" * 511, 1)[0][0] == 256
    size = text.WINDOW
    rows = text.evenly_spread(Words([7]), " ".join(map(str, range(size))), 1)  # 7 begins nothing
    assert rows == [list(range(size))]
