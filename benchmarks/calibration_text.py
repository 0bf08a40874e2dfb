"""Windows of a text for the peers that calibrate, alike for all of them."""

from typing import Any

WINDOW = 512  # tokens


def evenly_spread(tokenizer: Any, text: str, count: int) -> list[list[int]]:
    """So many whole windows of tokens at even distances, each begun as the tokenizer does it.

    Raises ValueError if the text is too short.
    """
    begin = tokenizer("").input_ids[:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    size = WINDOW - len(begin)
    whole = len(tokens) // size
    if whole < count:
        raise ValueError(f"calibration needs {count * size} tokens, the text has {len(tokens)}")
    starts = [size * (i * whole // count) for i in range(count)]
    return [begin + tokens[start : start + size] for start in starts]
