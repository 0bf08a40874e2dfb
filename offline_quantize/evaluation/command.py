"""`precalib eval`: a packed checkpoint against its original, on text and on tasks."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import Checkpoint, open_checkpoint
from offline_quantize.cli import console
from offline_quantize.evaluation import multiple_choice
from offline_quantize.evaluation.kl import (
    DRAWN,
    TOP,
    WINDOW,
    Reference,
    compare,
    refer,
    text_windows,
    write_text,
)
from offline_quantize.evaluation.models import load_original, load_packed, load_tokenizer, versions
from offline_quantize.evaluation.reference_cache import cached, digest
from precalib_kernels.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    text:           files, or none.
    self_generated: let the original write the text.
    tokens:         how many to take or write.
    tasks:          multiple-choice files;  limit: questions of each, None for all.
    dtype, device:  what to compute in and where.
    """

    text: Sequence[Path] = ()
    self_generated: bool = False
    tokens: int = 8192
    tasks: Sequence[Path] = ()
    limit: int | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.text and self.self_generated:
            raise RecipeError("--text and --self-generated exclude each other; give one of them")
        if not (self.text or self.self_generated or self.tasks):
            raise RecipeError(
                "nothing to measure with; give --text FILE, --self-generated (which needs no "
                "data) or --tasks FILE"
            )


class Original:
    """An original model that is loaded only if something about it is not cached."""

    def __init__(self, source: Checkpoint, request: Request) -> None:
        self.root = source.root
        self.request = request
        self.key = {
            "fingerprint": source.fingerprint(),
            "dtype": str(request.dtype),
            "device": request.device,
            **versions(),
        }

    @functools.cached_property
    def model(self) -> "PreTrainedModel":
        """The model itself."""
        return load_original(self.root, self.request.dtype, self.request.device)

    def written(self, window: int) -> list[Tensor]:
        """Text of its own, as windows."""
        count = self.request.tokens
        found = cached(
            "text",
            self.key | {"tokens": count, "window": window, "seed": SEED},
            lambda: {"windows": torch.stack(write_text(self.model, count, window, SEED))},
        )
        return list(found["windows"])

    def reference(self, windows: Sequence[Tensor]) -> Reference:
        """Its distributions over the windows' tokens."""
        key = self.key | {
            "windows": [digest(window) for window in windows],
            "top": TOP,
            "drawn": DRAWN,
        }
        found = cached(
            "distributions", key, lambda: vars(refer(self.model, _steps("original", windows)))
        )
        return Reference(**found)

    def picks(self, prepared: Sequence[Sequence[multiple_choice.Answer]]) -> Tensor:
        """Its choices."""
        marks = [[digest(a.tokens), a.start, a.length] for answers in prepared for a in answers]
        found = cached(
            "choices",
            self.key | {"answers": marks},
            lambda: {"picks": multiple_choice.picks(self.model, _steps("original", prepared))},
        )
        return found["picks"]


def evaluate(directory: Path, source: Path, request: Request) -> dict[str, Any]:
    """Everything that was asked for, as JSON values.

    Raises SourceError, FormatError or OutputError in plain sentences.
    """
    packed = open_packed(directory)
    checkpoint = open_checkpoint(source)
    questions = {
        path: multiple_choice.read_questions(path, request.limit) for path in request.tasks
    }
    original = Original(checkpoint, request)
    longest = checkpoint.text_config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 1 else None
    window = min(WINDOW, longest or WINDOW)
    tokenizer: Any = load_tokenizer(source) if request.text or questions else None

    windows: list[Tensor] = []
    reference = None
    if request.self_generated:
        windows = original.written(window)
    elif request.text:
        windows = text_windows(tokenizer, request.text, request.tokens, window)
    if windows:
        reference = original.reference(windows)
    prepared = {
        path: [
            multiple_choice.answers(question, tokenizer, longest or 1 << 30) for question in asked
        ]
        for path, asked in questions.items()
    }
    picked = {path: original.picks(answers) for path, answers in prepared.items()}
    original.__dict__.pop("model", None)  # two models at once may not fit

    quantized = load_packed(directory, request.dtype, request.device)
    result: dict[str, Any] = {
        "directory": str(directory),
        "source": str(source),
        "recipe": packed.config.recipe,
        "bits_per_weight": packed.bits_per_weight,
        "dtype": str(request.dtype).removeprefix("torch."),
    }
    if reference is not None:
        text = "written by the original" if request.self_generated else _names(request.text)
        comparison = compare(reference, quantized, _steps("quantized", windows))
        result["text"] = {"of": text, "window": window, **comparison.summary()}
    if questions:
        result["tasks"] = {
            str(path): multiple_choice.summary(
                asked,
                picked[path],
                multiple_choice.picks(quantized, _steps("quantized", prepared[path])),
            )
            for path, asked in questions.items()
        }
    return result


def show(result: Mapping[str, Any]) -> None:
    """Print the result of `evaluate` as tables."""
    if text := result.get("text"):
        table = _table(f"{text['tokens']:,} tokens, {text['of']}")
        table.add_row("KL(original ‖ quantized) per token, mean", "", _number(text, "kl", ".4f"))
        table.add_row("  99th percentile", "", f"{text['kl_99']:.3f}")
        table.add_row("top-1 agreement", "", _percent(text, "agreement"))
        table.add_row(
            "perplexity",
            _number(text, "original_perplexity", ".3f"),
            _number(text, "perplexity", ".3f"),
        )
        console.show_table(table)
        console.out.print(
            f"KL in nats: exact over the original's {TOP} likeliest tokens, estimated from {DRAWN} "
            f"draws over the others (on average {100 * text['others_mass']:.1f} % of its mass)."
        )
    if measured := result.get("tasks"):
        table = _table("accuracy", "same choice")
        for path, task in measured.items():
            table.add_row(
                f"{Path(path).name}, {task['questions']:,} questions",
                _percent(task, "original_accuracy"),
                _percent(task, "accuracy"),
                f"{100 * task['same_choice']:.1f} %",
            )
        console.show_table(table)
        console.out.print(f"Choices are compared by {multiple_choice.NORMALISATION}.")
    console.out.print("In brackets: 95 % intervals (bootstrap).")


def _table(what: str, *more: str) -> Table:
    return console.new_table(what, "original", "quantized", *more)


def _number(values: Mapping[str, Any], name: str, form: str) -> str:
    low, high = values[f"{name}_interval"]
    return f"{values[name]:{form}} [{low:{form}}–{high:{form}}]"


def _percent(values: Mapping[str, Any], name: str) -> str:
    low, high = (100 * bound for bound in values[f"{name}_interval"])
    return f"{100 * values[name]:.1f} % [{low:.1f}–{high:.1f}]"


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _steps(what: str, items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a progress bar on a terminal."""
    hidden = not console.err.is_terminal
    yield from track(items, what, console=console.err, transient=True, disable=hidden)
