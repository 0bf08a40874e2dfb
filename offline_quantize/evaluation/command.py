"""`precalib eval`: a packed checkpoint against its original, on text and on tasks."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import Checkpoint, open_checkpoint
from offline_quantize.evaluation import multiple_choice
from offline_quantize.evaluation.arithmetic import default_dtype
from offline_quantize.evaluation.begin_token import (
    advice,
    begin_tokens,
    named_token,
    perplexities,
)
from offline_quantize.evaluation.kl import (
    TAIL_SAMPLES,
    TOP,
    WINDOW,
    ReferenceDistributions,
    compare,
    generate_text,
    reference_distributions,
    text_windows,
)
from offline_quantize.evaluation.models import (
    check_tokenizer,
    load_original,
    load_packed,
    load_tokenizer,
    versions,
)
from offline_quantize.evaluation.reference_cache import cached, digest
from offline_quantize.evaluation.result import EvaluationResult
from precalib_kernels.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0
UNLIMITED = 1 << 30  # tokens, of a model whose config names no limit
Item = TypeVar("Item")


class Track(Protocol):
    """Passes items on, and may show how many are left."""

    def __call__(self, what: str, items: Sequence[Item]) -> Iterable[Item]:
        """The items; `what` says in a word or two what is done with them."""


def untracked(what: str, items: Sequence[Item]) -> Iterable[Item]:  # noqa: ARG001
    """The items, with nothing shown."""
    return items


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    text:           files, or none.
    self_generated: let the original write the text.
    tokens:         how many to take or generate.
    tasks:          multiple-choice files;  limit: questions of each, None for all.
    dtype, device:  what to compute in and where; no type for `default_dtype`.
    begin_token:    put the model's begin token before every text if its tokenizer does not. Text
                    that the original writes begins with it anyway.

    Raises UsageError when there is nothing to measure with, or two kinds of text.
    """

    text: Sequence[Path] = ()
    self_generated: bool = False
    tokens: int = 8192
    tasks: Sequence[Path] = ()
    limit: int | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    begin_token: bool = False

    @property
    def computed_in(self) -> torch.dtype:
        """The type to compute in."""
        return self.dtype or default_dtype(self.device)

    def __post_init__(self) -> None:
        if self.text and self.self_generated:
            raise UsageError("--text and --self-generated exclude each other; give one of them")
        if not (self.text or self.self_generated or self.tasks):
            raise UsageError(
                "nothing to measure with; give --text FILE, --self-generated (which needs no "
                "data) or --tasks FILE"
            )


class OriginalModel:
    """An original model and what it says, which is kept on disk.

    The model is loaded at the first thing that is not there yet, and stays until `unload`.
    """

    def __init__(self, source: Checkpoint, request: Request, track: Track = untracked) -> None:
        self.root = source.root
        self.request = request
        self.track = track
        self.key = {
            "fingerprint": source.fingerprint(),
            "dtype": str(request.computed_in),
            "device": request.device,
            **versions(),
        }
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The model itself."""
        if self._model is None:
            self._model = load_original(self.root, self.request.computed_in, self.request.device)
        return self._model

    def unload(self) -> None:
        """Free the model's memory: two models at once may not fit."""
        self._model = None

    def generated_text(self, window: int) -> list[Tensor]:
        """Text of its own, as windows."""
        count = self.request.tokens
        found = cached(
            "text",
            self.key | {"tokens": count, "window": window, "seed": SEED},
            lambda: {"windows": torch.stack(generate_text(self.model, count, window, SEED))},
        )
        return list(found["windows"])

    def distributions(self, windows: Sequence[Tensor]) -> ReferenceDistributions:
        """Its distributions over the windows' tokens."""
        key = self.key | {
            "windows": [digest(window) for window in windows],
            "top": TOP,
            "tail_samples": TAIL_SAMPLES,
        }
        found = cached(
            "distributions",
            key,
            lambda: vars(reference_distributions(self.model, self.track("original", windows))),
        )
        return ReferenceDistributions(**found)

    def perplexities(self, texts: Sequence[Tensor], token: int) -> Tensor:
        """Its perplexity without and with a token before every text, float32 [2]."""
        found = cached(
            "perplexities",
            self.key | {"texts": [digest(text) for text in texts], "token": token},
            lambda: {"perplexities": perplexities(self.model, texts, token)},
        )
        return found["perplexities"]

    def predictions(self, prepared: Sequence[Sequence[multiple_choice.Answer]]) -> Tensor:
        """Its choices, int64 [questions]."""
        marks = [[digest(a.tokens), a.start, a.length] for answers in prepared for a in answers]
        found = cached(
            "predictions",
            self.key | {"answers": marks},
            lambda: {
                "predictions": multiple_choice.predictions(
                    self.model, self.track("original", prepared)
                )
            },
        )
        return found["predictions"]


def evaluate(
    directory: Path, source: Path, request: Request, track: Track = untracked
) -> EvaluationResult:
    """Compare a packed checkpoint with its source.

    Raises SourceError, FormatError, InputError, UsageError or OutputError in plain sentences.
    """
    packed = open_packed(directory)
    checkpoint = open_checkpoint(source)
    if request.text or request.tasks:
        check_tokenizer(source)  # long before it is needed
    questions = {
        path: multiple_choice.read_questions(path, request.limit) for path in request.tasks
    }
    original = OriginalModel(checkpoint, request, track)
    asked = _ask(original, checkpoint, request, questions)
    reference = original.distributions(asked.windows) if asked.windows else None
    predicted = {path: original.predictions(answers) for path, answers in asked.prepared.items()}
    original.unload()

    quantized = load_packed(directory, request.computed_in, request.device)
    text = tasks = None
    if reference is not None:
        names = ", ".join(path.name for path in request.text)
        of = "written by the original" if request.self_generated else names
        compared = compare(reference, quantized, track("quantized", asked.windows))
        text = compared.summary(of, asked.window)
    if questions:
        tasks = {
            str(path): multiple_choice.summary(
                listed,
                predicted[path],
                multiple_choice.predictions(quantized, track("quantized", asked.prepared[path])),
            )
            for path, listed in questions.items()
        }
    return EvaluationResult(
        directory=str(directory),
        source=str(source),
        recipe=packed.config.recipe,
        bits_per_weight=packed.bits_per_weight,
        dtype=str(request.computed_in).removeprefix("torch."),
        begin_token=asked.begin[0] if asked.begin else None,
        warning=asked.warning,
        text=text,
        tasks=tasks,
    )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What both models are asked.

    window:   tokens at once;  windows: of the text;  prepared: the answers of every task.
    begin:    the token before every text, or nothing;  warning: why it may be missing.
    """

    window: int
    windows: Sequence[Tensor]
    prepared: Mapping[Path, Sequence[Sequence[multiple_choice.Answer]]]
    begin: Sequence[int]
    warning: str | None


def _ask(
    original: OriginalModel,
    checkpoint: Checkpoint,
    request: Request,
    questions: Mapping[Path, Sequence[multiple_choice.Question]],
) -> _Asked:
    config = checkpoint.text_config
    limit = config.get("max_position_embeddings")
    longest = limit if isinstance(limit, int) and limit > 1 else UNLIMITED
    window = min(WINDOW, longest)
    windows: list[Tensor] = []
    if request.self_generated:
        windows = original.generated_text(window)
    if not request.text and not questions:
        return _Asked(window, windows, {}, windows[0][:1].tolist(), None)

    tokenizer = load_tokenizer(checkpoint.root)
    begin = begin_tokens(tokenizer, config, request.begin_token)
    if request.text:
        windows = text_windows(tokenizer, request.text, request.tokens, window, begin)
    prepared = {
        path: [multiple_choice.answers(question, tokenizer, longest, begin) for question in listed]
        for path, listed in questions.items()
    }
    warning = None
    named = named_token(tokenizer, config)
    if not begin and named is not None:
        queries = [choices[0].tokens for answers in prepared.values() for choices in answers]
        texts = queries if request.self_generated or not windows else windows
        # one more token must fit into a window
        warning = advice(named, [text[: window - 1] for text in texts], original.perplexities)
    return _Asked(window, windows, prepared, begin, warning)
