"""How far a quantized model is from its original: KL divergence per token, agreement, perplexity.

Of each of the original's distributions the TOP likeliest tokens are kept, the mass of all others
together (the tail), and TAIL_SAMPLES tokens of the tail, drawn by their probability: that fits on
disk. The KL's sum over the likeliest tokens is exact; the sum over the tail is estimated as its
mass times the mean of log p/q over the samples. The estimate has no bias, and its noise is part of
the bootstrap interval. (Taking the tail as one token would be biased: 4.5 % below the true KL of a
135M model at 4.3 bits, where it holds 3.3 % of the mass.)
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_quantize.evaluation.bootstrap import BLOCK, mean_interval
from offline_quantize.evaluation.models import bos_tokens, input_device
from offline_quantize.evaluation.result import TextResult
from precalib_kernels.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512  # tokens a model sees at once; windows do not overlap
TOP = 1024
TAIL_SAMPLES = 16
CHARACTERS = 64  # read per wanted token; text has about 4
RUN = 256  # neighbouring tokens whose probabilities are summed at once


@dataclasses.dataclass(frozen=True)
class ReferenceDistributions:
    """The original's distributions of all T predicted tokens.

    tokens:  int32 [T, k], the likeliest tokens, likeliest first.
    log_p:   float32 [T, k], their log-probabilities.
    tail_log_mass: float32 [T], log-probability of all other tokens together; -inf if there are
             none.
    tail_samples:  int32 [T, d], tokens of the tail, drawn with replacement by their probability.
    tail_log_p:    float32 [T, d], their log-probabilities.
    target_log_p:  float32 [T], log-probability of the token that follows.
    """

    tokens: Tensor
    log_p: Tensor
    tail_log_mass: Tensor
    tail_samples: Tensor
    tail_log_p: Tensor
    target_log_p: Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Measurements [T] of a model against its original, over the same predicted tokens.

    kl:        KL(original ‖ quantized) of the next-token distributions, in nats; estimated as
               above, so it can be a little below zero.
    agreement: whether the original's first token is first in the quantized model too.
    loss, original_loss: −log p of the token that follows, in nats.
    tail_mass: the original's mass outside its likeliest tokens.
    """

    kl: Tensor
    agreement: Tensor
    loss: Tensor
    original_loss: Tensor
    tail_mass: Tensor

    def summary(self, of: str, window: int = WINDOW) -> TextResult:
        """Means with 95 % intervals by bootstrap over blocks of neighbouring tokens.

        of, window: what `TextResult` says of the text.
        """
        agreement = self.agreement.float()
        return TextResult(
            of=of,
            window=window,
            tokens=len(self.kl),
            kl=float(self.kl.double().mean()),
            kl_interval=mean_interval(self.kl, BLOCK),
            kl_99=float(torch.quantile(self.kl, 0.99)),
            agreement=float(agreement.mean()),
            agreement_interval=mean_interval(agreement, BLOCK),
            perplexity=float(self.loss.double().mean().exp()),
            perplexity_interval=_exponential(mean_interval(self.loss, BLOCK)),
            original_perplexity=float(self.original_loss.double().mean().exp()),
            original_perplexity_interval=_exponential(mean_interval(self.original_loss, BLOCK)),
            tail_mass=float(self.tail_mass.double().mean()),
        )


def text_windows(
    tokenizer: "PreTrainedTokenizerBase",
    files: Sequence[Path],
    count: int,
    window: int = WINDOW,
    begin: Sequence[int] | None = None,
) -> list[Tensor]:
    """The files' first `count` tokens, cut into windows that each begin as a text does.

    begin: tokens before every window; None for those that the tokenizer adds.

    Raises InputError for a file that is no text and for less than two tokens in all.
    """
    bos = bos_tokens(tokenizer) if begin is None else list(begin)
    tokens: list[int] = []
    for file in files:
        try:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(CHARACTERS * count)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"{file}: cannot be read ({reason}); give a text file") from error
        tokens += tokenizer(text, add_special_tokens=False).input_ids[: count - len(tokens)]
    if len(bos) + len(tokens) < 2:
        raise InputError(f"{', '.join(map(str, files))}: too little text; give a longer one")
    size = window - len(bos)
    pieces = [bos + tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def generate_text(
    model: "PreTrainedModel", count: int, window: int = WINDOW, seed: int = 0
) -> list[Tensor]:
    """Windows of about `count` tokens that the model itself writes, sampled from its distribution.

    Nothing is cut off and the temperature is 1, so the mean KL over such text estimates the KL per
    token between the two models as writers of text. An end token is text like any other here.

    Raises UsageError when the model names no token to begin with.
    """
    config = model.config.get_text_config()
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    begin = begin[0] if isinstance(begin, list) else begin
    if begin is None:
        raise UsageError(
            "the original has neither bos_token_id nor eos_token_id to begin a text with; "
            "give a text with --text"
        )
    window = min(window, count)
    rows = max(1, round(count / window))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((rows, 1), begin)
    past = None
    for _ in range(window - 1):
        out = model(tokens[:, -1:].to(input_device(model)), past_key_values=past, use_cache=True)
        past = out.past_key_values
        p = out.logits[:, -1].float().softmax(-1).cpu()
        tokens = torch.cat((tokens, _draw(p, generator)), 1)
    return list(tokens)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A token [rows, 1] by the probabilities [rows, vocabulary] of each row.

    The inverse of the distribution function takes one random number a row; `torch.multinomial`
    takes one for each token of the vocabulary, and more time than a small model. The function is
    inverted for runs of tokens, then within one: adding up all tokens one by one is slow.
    """
    rows, vocabulary = p.shape
    runs = torch.nn.functional.pad(p, (0, -vocabulary % RUN)).view(rows, -1, RUN)
    sums = runs.sum(2).double()
    place = torch.rand(rows, 1, dtype=torch.float64, generator=generator) * sums.sum(1, True)
    run, place = _invert(sums, place)
    token, _ = _invert(runs[torch.arange(rows), run[:, 0]].double(), place)
    return run * RUN + token


def _invert(p: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Which of p [rows, n] the place [rows, 1] lies in when they are laid side by side, and where
    in it. What lies behind the last one by rounding is taken to be in it.
    """
    ends = p.cumsum(1)
    place = place.minimum(torch.nextafter(ends[:, -1:], torch.zeros_like(place)))
    found = torch.searchsorted(ends, place, right=True)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, found)
    return found, place - before


@torch.inference_mode()
def log_probabilities(model: "PreTrainedModel", window: Tensor) -> Tensor:
    """log p of every next token of a window [n]: float32 [n - 1, vocabulary]."""
    logits: Tensor = model(window[None].to(model.device)).logits[0, :-1]
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def reference_distributions(
    model: "PreTrainedModel",
    windows: Iterable[Tensor],
    top: int = TOP,
    samples: int = TAIL_SAMPLES,
) -> ReferenceDistributions:
    """The original's distributions over the windows' tokens."""
    parts: list[tuple[Tensor, ...]] = []
    generator = torch.Generator(model.device).manual_seed(0)
    for window in windows:
        log_p = log_probabilities(model, window)
        tokens = log_p.topk(min(top, log_p.shape[1])).indices
        tail = log_p.scatter(1, tokens, -torch.inf)
        whole = tokens.shape[1] == log_p.shape[1]
        sampled = sample(tail, 0 if whole else samples, generator)
        part = (
            tokens.int(),
            log_p.gather(1, tokens),
            tail.logsumexp(1),
            sampled.int(),
            log_p.gather(1, sampled),
            log_p.gather(1, window[1:, None].to(log_p.device))[:, 0],
        )
        parts.append(tuple(tensor.cpu() for tensor in part))
    return ReferenceDistributions(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.inference_mode()
def compare(
    reference: ReferenceDistributions, model: "PreTrainedModel", windows: Iterable[Tensor]
) -> Comparison:
    """Measure a model against the original over the same windows."""
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    for window in windows:
        log_q = log_probabilities(model, window)
        rows = slice(start, start := start + len(log_q))
        part = ReferenceDistributions(
            *(tensor[rows].to(log_q.device) for tensor in vars(reference).values())
        )
        first = log_q.gather(1, part.tokens[:, :1].long())[:, 0]
        same = first == log_q.amax(1)  # 16-bit logits tie: any of the first is first
        loss = -log_q.gather(1, window[1:, None].to(log_q.device))[:, 0]
        parts.append((divergence(part, log_q).cpu(), same.cpu(), loss.cpu()))
    kl, same, loss = (torch.cat(part) for part in zip(*parts, strict=True))
    return Comparison(kl, same, loss, -reference.target_log_p, reference.tail_log_mass.exp())


def sample(log_p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens [T, count] drawn with replacement from distributions [T, vocabulary].

    log_p: log-probabilities, up to a constant in each row.
    """
    if not count:
        return torch.empty(len(log_p), 0, dtype=torch.int64, device=log_p.device)
    p = log_p.softmax(1).nan_to_num(1)  # no mass at all: what is drawn then counts for nothing
    return p.multinomial(count, replacement=True, generator=generator)


def divergence(reference: ReferenceDistributions, log_q: Tensor) -> Tensor:
    """KL(original ‖ model) [T] in nats, the tail's part of it estimated.

    log_q: the model's log-probabilities, float32 [T, vocabulary].
    """
    p, tail_mass = reference.log_p.exp(), reference.tail_log_mass.exp()
    ratio = reference.log_p - log_q.gather(1, reference.tokens.long())
    kl = torch.where(p > 0, p * ratio, 0).sum(1)
    if not reference.tail_samples.shape[1]:
        return kl
    tail_ratio = reference.tail_log_p - log_q.gather(1, reference.tail_samples.long())
    return kl + torch.where(tail_mass > 0, tail_mass * tail_ratio.mean(1), 0)


def _exponential(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = torch.tensor(bounds, dtype=torch.float64).exp().tolist()
    return low, high
