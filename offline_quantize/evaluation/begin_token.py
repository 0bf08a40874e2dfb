"""The token that begins a text: whether the tokenizer adds it, and whether the model needs it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.evaluation.kl import log_probabilities
from offline_quantize.evaluation.models import bos_tokens
from precalib_kernels.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 4  # texts on which its effect is measured
NEEDED = 1.1  # perplexity without it, relative to perplexity with it


def begin_tokens(
    tokenizer: "PreTrainedTokenizerBase", config: Mapping[str, Any], wanted: bool
) -> list[int]:
    """What every text begins with: what the tokenizer adds, else the named token if it is wanted.

    config: the model's text config.

    Raises UsageError when it is wanted and neither config nor tokenizer names one.
    """
    added = bos_tokens(tokenizer)
    if added or not wanted:
        return added
    named = named_token(tokenizer, config)
    if named is None:
        raise UsageError(
            "--begin-token: neither the config nor the tokenizer names a begin token; leave it out"
        )
    return [named]


def named_token(tokenizer: "PreTrainedTokenizerBase", config: Mapping[str, Any]) -> int | None:
    """The begin token that the config names, else the tokenizer's."""
    for named in (config.get("bos_token_id"), tokenizer.bos_token_id):
        token = named[0] if isinstance(named, list) and named else named
        if isinstance(token, int):
            return token
    return None


def perplexities(model: "PreTrainedModel", texts: Sequence[Tensor], token: int) -> Tensor:
    """Perplexity without and with the token before every text, of the same tokens: float32 [2].

    texts: int64 [n] each, of two tokens or more.
    """
    losses = []
    for begin in ([], [token]):
        log_p = []
        for text in texts:
            whole = torch.cat((torch.tensor(begin, dtype=text.dtype), text))
            found = log_probabilities(model, whole)[len(begin) :]
            log_p.append(found.gather(1, text[1:, None].to(found.device))[:, 0].cpu())
        losses.append(-torch.cat(log_p).mean())
    return torch.stack(losses).exp()


def advice(
    token: int, texts: Sequence[Tensor], measure: Callable[[Sequence[Tensor], int], Tensor]
) -> str | None:
    """A sentence if the texts lack a token without which the model babbles.

    measure: `perplexities` of the original.
    """
    texts = [text for text in texts if len(text) > 1][:SAMPLES]
    if not texts:
        return None
    without, having = measure(texts, token).tolist()
    if without < NEEDED * having:
        return None
    return (
        f"the tokenizer adds no begin token although the config names one ({token}), and with it "
        f"the original's perplexity is {having:.1f} instead of {without:.1f}: this result is "
        "likely meaningless; measure again with --begin-token"
    )
