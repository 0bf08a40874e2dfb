"""`precalib tune` on the command line."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from offline_quantize.checkpoint import hub
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.cli import console
from offline_quantize.cli.device import check_device
from offline_quantize.commands.tune import Tuning
from offline_quantize.commands.tune import tune as run_tune

DEFAULTS = Tuning()


def tune(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    against: Annotated[str, typer.Option(help="The source checkpoint: folder or Hugging Face id.")],
    tokens: Annotated[
        int, typer.Option(help="Tokens that the original writes to tune on.", min=2)
    ] = DEFAULTS.tokens,
    epochs: Annotated[int, typer.Option(help="Passes over them.", min=1)] = DEFAULTS.epochs,
    seed: Annotated[int, typer.Option(help="Of the text and of the order of steps.")] = 0,
    jobs: Annotated[int, typer.Option(help="Tensors written at a time; 0: one per core.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda:0.")] = "cpu",
) -> None:
    """Tune row and column scales on text that the original writes. Codes and sizes stay."""
    check_device(device)
    tuning = Tuning(tokens=tokens, epochs=epochs, seed=seed)
    with _steps() as report:
        manifest = run_tune(
            directory,
            target,
            hub.locate(against),
            tuning,
            NullProgress(),
            device=device,
            jobs=jobs or len(os.sched_getaffinity(0)),
            report=report,
        )
    console.show_totals(manifest.totals)
    console.out.print(f"{target}: tuned scales, all else as in {directory}.")


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[int, int, float], None]]:
    """Shows the steps of training and their KL, on a terminal."""
    if not console.err.is_terminal:
        yield lambda _step, _steps, _kl: None
        return
    with Progress(console=console.err, transient=True) as progress:
        task = progress.add_task("tuning", total=None)

        def report(step: int, steps: int, kl: float) -> None:
            description = f"tuning, KL {kl:.4f}"
            progress.update(task, completed=step, total=steps, description=description)

        yield report
