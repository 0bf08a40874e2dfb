"""What `precalib eval` shows: its progress and its result."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.progress import track
from rich.table import Table

from offline_quantize.cli import console
from offline_quantize.evaluation.kl import TAIL_SAMPLES, TOP
from offline_quantize.evaluation.multiple_choice import NORMALISATION
from offline_quantize.evaluation.result import EvaluationResult, Interval, TaskResult, TextResult

Item = TypeVar("Item")


def progress(what: str, items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a progress bar on a terminal."""
    hidden = not console.err.is_terminal
    yield from track(items, what, console=console.err, transient=True, disable=hidden)


def show(result: EvaluationResult) -> None:
    """Print a result as tables."""
    if result.text is not None:
        _show_text(result.text)
    if result.tasks:
        table = console.new_table("accuracy", "original", "quantized", "same choice")
        for path, task in result.tasks.items():
            _add_task(table, path, task)
        console.show_table(table)
        console.out.print(f"Choices are compared by {NORMALISATION}.")
    console.out.print(f"In brackets: 95 % intervals (bootstrap). Computed in {result.dtype}.")
    if result.warning:
        console.err.print(f"precalib: warning: {result.warning}", style="yellow")


def _show_text(text: TextResult) -> None:
    table = console.new_table(f"{text.tokens:,} tokens, {text.of}", "original", "quantized")
    kl = _number(text.kl, text.kl_interval, ".4f")
    table.add_row("KL(original ‖ quantized) per token, mean", "", kl)
    table.add_row("  99th percentile", "", f"{text.kl_99:.3f}")
    table.add_row("top-1 agreement", "", _percent(text.agreement, text.agreement_interval))
    table.add_row(
        "perplexity",
        _number(text.original_perplexity, text.original_perplexity_interval, ".3f"),
        _number(text.perplexity, text.perplexity_interval, ".3f"),
    )
    console.show_table(table)
    console.out.print(
        f"KL in nats: exact over the original's {TOP} likeliest tokens, estimated from "
        f"{TAIL_SAMPLES} draws over the others (on average {100 * text.tail_mass:.1f} % of its "
        "mass)."
    )


def _add_task(table: Table, path: str, task: TaskResult) -> None:
    table.add_row(
        f"{Path(path).name}, {task.questions:,} questions",
        _percent(task.original_accuracy, task.original_accuracy_interval),
        _percent(task.accuracy, task.accuracy_interval),
        f"{100 * task.same_choice:.1f} %",
    )


def _number(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}–{high:{form}}]"


def _percent(value: float, interval: Interval) -> str:
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:.1f} % [{low:.1f}–{high:.1f}]"
