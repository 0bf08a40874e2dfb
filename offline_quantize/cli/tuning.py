"""`precalib tune`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from offline_quantize.checkpoint import hub
from offline_quantize.cli import console
from offline_quantize.commands.tune import TOKENS, workload
from offline_quantize.commands.tune import tune as run_tune
from offline_quantize.device import check_device


def tune(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    against: Annotated[str, typer.Option(help="The source checkpoint: folder or Hugging Face id.")],
    tokens: Annotated[
        int, typer.Option(help="Tokens that the original writes, to learn from.")
    ] = TOKENS,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda:0.")] = "cpu",
) -> None:
    """Tune the scales of a packed checkpoint on text that the original writes: no data."""
    check_device(device)
    source = hub.locate(against)
    with console.progress_bar(workload(directory)) as progress:
        done = run_tune(directory, target, source, progress, tokens, device)
    fall = 100 * (1 - done.after / done.before)
    console.out.print(
        f"{target}: KL to the original on text held out {done.before:.4f} before, {done.after:.4f} "
        f"after ({fall:.0f} % less), {done.seconds:.0f} s."
    )
    folder = shlex.quote(str(target))
    console.out.print(f"Serve it:  vllm serve {folder} --quantization precalib")
