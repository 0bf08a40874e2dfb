"""How far a quantized model is from its original: KL divergence per token, agreement, perplexity.

Of each of the original's distributions the TOP likeliest tokens are kept, the mass of all others
together, and DRAWN of those others, drawn by their probability: that fits on disk. The KL's sum
over the likeliest tokens is exact; the sum over the others is estimated as their mass times the
mean of log p/q over the drawn ones. The estimate has no bias, and its noise is part of the
bootstrap interval. (Taking the others as one token would be biased: 4.5 % below the true KL of a
135M model at 4.3 bits, where they hold 3.3 % of the mass.)
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.evaluation.bootstrap import BLOCK, mean_interval
from offline_quantize.evaluation.models import bos_tokens
from precalib_kernels.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512  # tokens a model sees at once; windows do not overlap
TOP = 1024
DRAWN = 16
CHARACTERS = 64  # read per wanted token; text has about 4


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original's distributions of all T predicted tokens.

    tokens:  int32 [T, k], the likeliest tokens, likeliest first.
    log_p:   float32 [T, k], their log-probabilities.
    others:  float32 [T], log-probability of all other tokens together, -inf if there are none.
    drawn:   int32 [T, d], others drawn with replacement by their probability.
    drawn_log_p: float32 [T, d], their log-probabilities.
    target:  float32 [T], log-probability of the token that follows.
    """

    tokens: Tensor
    log_p: Tensor
    others: Tensor
    drawn: Tensor
    drawn_log_p: Tensor
    target: Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Measurements [T] of a model against its original, over the same predicted tokens.

    kl:        KL(original ‖ quantized) of the next-token distributions, in nats; estimated as
               above, so it can be a little below zero.
    agreement: whether the original's first token is first in the quantized model too.
    loss, original_loss: −log p of the token that follows, in nats.
    others:    the original's mass outside its likeliest tokens.
    """

    kl: Tensor
    agreement: Tensor
    loss: Tensor
    original_loss: Tensor
    others: Tensor

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals by bootstrap over blocks of neighbouring tokens."""
        agreement = self.agreement.float()
        return {
            "tokens": len(self.kl),
            "kl": float(self.kl.double().mean()),
            "kl_interval": mean_interval(self.kl, BLOCK),
            "kl_99": float(torch.quantile(self.kl, 0.99)),
            "agreement": float(agreement.mean()),
            "agreement_interval": mean_interval(agreement, BLOCK),
            "perplexity": float(self.loss.double().mean().exp()),
            "perplexity_interval": _exponential(mean_interval(self.loss, BLOCK)),
            "original_perplexity": float(self.original_loss.double().mean().exp()),
            "original_perplexity_interval": _exponential(mean_interval(self.original_loss, BLOCK)),
            "others_mass": float(self.others.double().mean()),
        }


def text_windows(
    tokenizer: "PreTrainedTokenizerBase", files: Sequence[Path], count: int, window: int = WINDOW
) -> list[Tensor]:
    """The files' first `count` tokens, cut into windows that each begin as a text does.

    Raises SourceError for a file that is no text and for less than two tokens in all.
    """
    opening = bos_tokens(tokenizer)
    tokens: list[int] = []
    for file in files:
        try:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(CHARACTERS * count)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise SourceError(f"{file}: cannot be read ({reason}); give a text file") from error
        tokens += tokenizer(text, add_special_tokens=False).input_ids[: count - len(tokens)]
    if len(opening) + len(tokens) < 2:
        raise SourceError(f"{', '.join(map(str, files))}: too little text; give a longer one")
    size = window - len(opening)
    pieces = [opening + tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def write_text(
    model: "PreTrainedModel", count: int, window: int = WINDOW, seed: int = 0
) -> list[Tensor]:
    """Windows of about `count` tokens that the model itself writes, sampled from its distribution.

    Nothing is cut off and the temperature is 1, so the mean KL over such text estimates the KL per
    token between the two models as writers of text. An end token is text like any other here.

    Raises SourceError when the model names no token to begin with.
    """
    config = model.config.get_text_config()
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    begin = begin[0] if isinstance(begin, list) else begin
    if begin is None:
        raise SourceError(
            "the original has neither bos_token_id nor eos_token_id to begin a text with; "
            "give a text with --text"
        )
    window = min(window, count)
    rows = max(1, round(count / window))
    generator = torch.Generator().manual_seed(seed)
    written = torch.full((rows, 1), begin)
    past = None
    for _ in range(window - 1):
        out = model(written[:, -1:].to(model.device), past_key_values=past, use_cache=True)
        past = out.past_key_values
        share = out.logits[:, -1].float().softmax(-1).cpu()
        written = torch.cat((written, torch.multinomial(share, 1, generator=generator)), 1)
    return list(written)


@torch.inference_mode()
def log_probabilities(model: "PreTrainedModel", window: Tensor) -> Tensor:
    """log p of every next token of a window [n]: float32 [n - 1, vocabulary]."""
    logits = model(window[None].to(model.device)).logits[0, :-1]
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def refer(
    model: "PreTrainedModel", windows: Iterable[Tensor], top: int = TOP, draws: int = DRAWN
) -> Reference:
    """The original's distributions over the windows' tokens."""
    parts: list[tuple[Tensor, ...]] = []
    generator = torch.Generator(model.device).manual_seed(0)
    for window in windows:
        log_p = log_probabilities(model, window)
        tokens = log_p.topk(min(top, log_p.shape[1])).indices
        others = log_p.scatter(1, tokens, -torch.inf)
        drawn = draw(others, draws if tokens.shape[1] < log_p.shape[1] else 0, generator)
        target = log_p.gather(1, window[1:, None].to(log_p.device))[:, 0]
        mass = others.logsumexp(1)
        near, far = log_p.gather(1, tokens), log_p.gather(1, drawn)
        part = (tokens.int(), near, mass, drawn.int(), far, target)
        parts.append(tuple(tensor.cpu() for tensor in part))
    return Reference(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.inference_mode()
def compare(
    reference: Reference, model: "PreTrainedModel", windows: Iterable[Tensor]
) -> Comparison:
    """Measure a model against the original over the same windows."""
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    for window in windows:
        own = log_probabilities(model, window)
        rows = slice(start, start := start + len(own))
        part = Reference(*(tensor[rows].to(own.device) for tensor in vars(reference).values()))
        first = own.gather(1, part.tokens[:, :1].long())[:, 0]
        same = first == own.amax(1)  # 16-bit logits tie: any of the first is first
        loss = -own.gather(1, window[1:, None].to(own.device))[:, 0]
        parts.append((divergence(part, own).cpu(), same.cpu(), loss.cpu()))
    kl, same, loss = (torch.cat(part) for part in zip(*parts, strict=True))
    return Comparison(kl, same, loss, -reference.target, reference.others.exp())


def draw(log_p: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Tokens [T, draws] drawn with replacement from log-probabilities [T, vocabulary] up to a
    constant.
    """
    if not draws:
        return torch.empty(len(log_p), 0, dtype=torch.int64, device=log_p.device)
    share = log_p.softmax(1).nan_to_num(1)  # no mass at all: what is drawn then counts for nothing
    return share.multinomial(draws, replacement=True, generator=generator)


def divergence(reference: Reference, own: Tensor) -> Tensor:
    """KL(original ‖ model) [T] in nats, the part inside the others' mass estimated.

    own: the model's log-probabilities, float32 [T, vocabulary].
    """
    p, mass = reference.log_p.exp(), reference.others.exp()
    near = own.gather(1, reference.tokens.long())
    kl = torch.where(p > 0, p * (reference.log_p - near), 0).sum(1)
    if not reference.drawn.shape[1]:
        return kl
    ratio = reference.drawn_log_p - own.gather(1, reference.drawn.long())
    return kl + torch.where(mass > 0, mass * ratio.mean(1), 0)


def _exponential(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = torch.tensor(bounds, dtype=torch.float64).exp().tolist()
    return low, high
