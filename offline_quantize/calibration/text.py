"""The text that goes through a model: of random tokens, of its own, or of a file."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_quantize.evaluation.kl import WINDOW, generate_text, text_windows
from offline_quantize.evaluation.models import load_tokenizer
from precalib_kernels.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0
# Short windows: the first token of a text fills columns that must not be wrong, and more first
# tokens give these their weight (docs/method.md). A step of writing takes little longer for more
# windows, so short ones are written sooner, too.
RANDOM_WINDOW = 32
OWN_WINDOW = 32


def random_tokens(model: "PreTrainedModel", count: int, seed: int = SEED) -> list[Tensor]:
    """About `count` token ids, each as likely as any other, in windows that begin as texts do."""
    config = model.config.get_text_config()
    window = min(RANDOM_WINDOW, longest_window(model, count))
    shape = max(1, round(count / window)), window
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    begin = config.bos_token_id
    if begin is not None:
        tokens[:, 0] = begin[0] if isinstance(begin, list) else begin
    return list(tokens)


def own_text(model: "PreTrainedModel", count: int, seed: int = SEED) -> list[Tensor]:
    """About `count` tokens that the model writes, sampled from its distribution.

    Raises UsageError when the model names no token to begin with.
    """
    try:
        return generate_text(model, count, min(OWN_WINDOW, longest_window(model, count)), seed)
    except UsageError as error:
        raise UsageError(
            "the model has neither bos_token_id nor eos_token_id to begin a text with; give one "
            "with --activations FILE"
        ) from error


def text_of_file(model: "PreTrainedModel", source: Path, file: Path, count: int) -> list[Tensor]:
    """At most `count` tokens of a file, in windows of one length.

    source: folder of the checkpoint, for its tokenizer.

    Raises InputError for a file that is no text or is too short, SourceError without a tokenizer.
    """
    window = longest_window(model, count)
    windows = text_windows(load_tokenizer(source), [file], count, window)
    whole = [piece for piece in windows if len(piece) == len(windows[0])]
    if len(whole[0]) < min(window, 32):
        raise InputError(f"{file}: {len(whole[0])} tokens are too few; give a longer text")
    return whole


def longest_window(model: "PreTrainedModel", count: int) -> int:
    """Tokens of the longest window that a model takes, of a text of `count` tokens."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    return max(2, min(WINDOW, count, longest))
