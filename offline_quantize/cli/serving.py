"""The command that measures servers: `precalib bench`."""

import importlib.util
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from offline_quantize.cli import console
from precalib_kernels.errors import UsageError


def bench(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|URL",
            help="What to measure beside it: a checkpoint to serve, or the address of a server. "
            "Ratios are relative to the first.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For the results; NAME-bench if not given. A run goes on there."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each load is measured.", min=1)] = 3,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no measurement after that long.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,…", help="Numbers of requests at once.")
    ] = "1,4,16,64",
    prompts: Annotated[
        str, typer.Option(metavar="short,long", help="Lengths of the prompts.")
    ] = "short,long",
    serve_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="For every vllm serve that is started.")
    ] = "",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="1 and 4 requests, short prompts, 2 rounds, eager servers."),
    ] = False,
) -> None:
    """Measure a packed checkpoint as vLLM serves it, beside other models or servers, in rounds."""
    if importlib.util.find_spec("psutil") is None:
        raise UsageError("bench needs psutil; install what it needs with 'vllm-precalib[bench]'")
    from offline_quantize.benchmark.command import Request
    from offline_quantize.benchmark.command import bench as run_bench

    try:
        numbers = [int(text) for text in concurrency.split(",")]
    except ValueError:
        raise UsageError(
            f"--concurrency {concurrency!r} is no list of numbers such as 1,4"
        ) from None
    request = Request(
        directory,
        against or (),
        out or Path(f"{directory.resolve().name}-bench"),
        rounds,
        minutes,
        numbers,
        [text.strip() for text in prompts.split(",")],
        shlex.split(serve_flags),
        quick,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped then, too
    for path in run_bench(request, console.out.print):
        console.out.print(f"Wrote {path}")
