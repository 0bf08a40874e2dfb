"""The command that measures servers: `precalib bench`."""

import enum
import importlib.util
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from offline_quantize.cli import console
from precalib_kernels.errors import UsageError

if TYPE_CHECKING:
    from offline_quantize.benchmark.cases import Mode


class Driver(enum.Enum):
    """What measures servers."""

    vllm = "vllm"
    guidellm = "guidellm"


def bench(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|URL|NAME=COMMAND",
            help="What to measure beside it: a checkpoint to serve, the address of a server, or "
            "the command of a server with {port} where its port goes. Ratios are relative to the "
            "first. NAME= may stand before each.",
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
    modes: Annotated[
        str,
        typer.Option(
            metavar="serve,throughput,latency",
            help="Servers with clients; engines without a server that get all requests at the "
            "beginning; such engines that get a batch at a time.",
        ),
    ] = "serve",
    driver: Annotated[
        Driver,
        typer.Option(help="What measures servers: vllm bench serve, or GuideLLM if installed."),
    ] = Driver.vllm,
    concurrency: Annotated[
        str, typer.Option(metavar="N,…", help="Numbers of requests at once.")
    ] = "1,4,16,64",
    prompts: Annotated[
        str, typer.Option(metavar="brief,short,long", help="Lengths of the prompts.")
    ] = "short,long",
    serve_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="For every engine of vLLM that is started.")
    ] = "",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Servers only, 1 and 4 requests, brief prompts, 2 rounds, eager, 3 minutes.",
        ),
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
        cast("list[Mode]", [text.strip() for text in modes.split(",")]),
        driver.value,
        shlex.split(serve_flags),
        quick,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped then, too
    for path in run_bench(request, console.out.print):
        console.out.print(f"Wrote {path}")
