"""The command `precalib`."""

import contextlib
import enum
import os
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from offline_quantize import memory
from offline_quantize.calibration.choice import choose_activations
from offline_quantize.checkpoint import hub
from offline_quantize.checkpoint.atomic_files import check_folder, json_bytes, write_json
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.run import State
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.cli import console, evaluation_tables, inspection, serving, sharing, tuning
from offline_quantize.cli import doctor as diagnosis
from offline_quantize.commands.dequantize import dequantize as run_dequantize
from offline_quantize.commands.dequantize import workload as dequantize_workload
from offline_quantize.commands.quantize import check_cluster, run_of
from offline_quantize.commands.quantize import quantize as run_quantize
from offline_quantize.commands.verify import verify as run_verify
from offline_quantize.commands.verify import workload
from offline_quantize.device import check_device
from offline_quantize.evaluation import command as evaluation
from offline_quantize.method.recipes import DEFAULT, RECIPES
from offline_quantize.planning.activation_options import TOKENS, TOKENS_WITH_FEEDBACK
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from offline_quantize.report import Request, check_out, write_report
from precalib_kernels.errors import PrecalibError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2–5 bits without data, for vLLM.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"precalib {version('vllm-precalib')}")
        raise typer.Exit


@app.callback()
def precalib(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


class DType(enum.StrEnum):
    """Types a packed checkpoint can be turned back into."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a Hugging Face id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    recipe: Annotated[
        str | None,
        typer.Option(help=f"One of: {', '.join(RECIPES)}. If not given: {DEFAULT}."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Instead of a recipe: effective bits per weight, 2.25 to 5.3, at most."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a base code: 2, 3, 4, 5.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale, a multiple of 32.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of salient weights, 0.05 for 5 %.")
    ] = None,
    salient_bits: Annotated[
        int | None, typer.Option(help="Bits of a salient code: those of a base code to 8.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Share of the non-salient range a min-max grid covers.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=RECIPE", help="Another recipe for matching modules."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave matching modules unquantized."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Pack the output head, too, which stays unquantized otherwise."
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Pack the input embeddings, too, and with them the head of a model that shares "
            "them, unless --head names another recipe. Refused where vLLM takes none.",
        ),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            metavar="auto|none|random|self|FILE",
            help="What goes through the model first, to know the inputs of its layers: random "
            "tokens, text that it writes itself, or a text file; auto: random tokens, with "
            "--feedback text of its own, and nothing if transformers cannot run the model.",
        ),
    ] = "auto",
    activation_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"How many tokens of it. If not given: {TOKENS:,}, with --feedback "
            f"{TOKENS_WITH_FEEDBACK:,}.",
            min=2,
        ),
    ] = None,
    feedback: Annotated[
        bool,
        typer.Option("--feedback", help="Let codes take up the errors of the codes before them."),
    ] = False,
    transform: Annotated[
        str | None,
        typer.Option(
            metavar="value-output",
            help="Transform pairs of value and output weights first, without effect on the model.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Tensors at a time; 0: one per core.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda:0.")] = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread the tensors over the CPUs of a Ray cluster whose machines see source and "
            "target under the same paths: HOST:PORT of its head, or auto.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    report_to: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write a report, an HTML page, here."),
    ] = None,
    no_card: Annotated[
        bool,
        typer.Option("--no-card", help="Write no model card; copy the README.md of the source."),
    ] = False,
) -> None:
    """Quantize a checkpoint, without data. Tensors are chosen by name."""
    changes: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "alpha": alpha,
        "salient_bits": salient_bits,
        "clip": clip,
    }
    overrides = [_override(text) for text in override or ()]
    options = Options(
        recipe,
        changes,
        overrides,
        keep or (),
        target_bits,
        head,
        embeddings=embeddings,
        transform=transform,
        card=not no_card,
    )
    check_device(device)
    check_cluster(ray, jobs, device)
    root = hub.locate(source)
    if ray is not None:  # other machines know no paths relative to a folder of this one
        root, target = root.absolute(), target.absolute()
    plan = make_plan(open_checkpoint(root), options)
    plan, reason = choose_activations(plan, activations, activation_tokens, feedback)
    if dry_run:
        console.show_plan(plan)
        console.show_activations(plan, reason)
        if run_of(plan, target, device).state(resume) is State.FINISHED:
            console.out.print(f"{target} holds all of it already.")
        return
    if report_to is not None:
        check_out(report_to, option="--report", made=target)
    threads = jobs or len(os.sched_getaffinity(0))
    total = plan.source.nbytes + plan.output_bytes
    with _resumable("add --resume to continue"), console.progress_bar(total) as progress:
        outcome = run_quantize(plan, target, progress, threads, device, resume, ray)
    if outcome.seconds is None:
        console.out.print(f"{target} was finished before; nothing to do.")
    console.show_unquantized(plan.unquantized, plan.source.skipped_files)
    console.show_notes(plan)
    console.show_activations(plan, reason, outcome.unknown)
    console.show_totals(outcome.manifest, outcome.seconds)
    console.show_model_size(plan.model_size)
    if report_to is not None:
        seconds = None if resume else outcome.seconds  # a resumed run knows its last part alone
        seconds = None if ray else seconds  # a cluster has more jobs than there are threads here
        _report(target, Request(report_to, plan.source.root, seconds=seconds, jobs=threads))
    folder = shlex.quote(str(target))
    console.out.print(f"Serve it:  vllm serve {folder} --quantization precalib")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what is in a packed checkpoint: every tensor, its effective bits and its error."""
    packed = open_packed(directory)
    manifest = read_manifest(directory)
    if json:
        console.out.print(json_bytes(inspection.contents(packed, manifest)).decode(), end="")
    else:
        inspection.show(packed, manifest)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    against: Annotated[
        str | None, typer.Option(help="The source checkpoint: recompute every error.")
    ] = None,
) -> None:
    """Check hashes, structure and value ranges; with --against also every error."""
    source = hub.locate(against) if against else None
    faults = 0
    with console.progress_bar(workload(directory, source)) as progress:
        for fault in run_verify(directory, source, progress):
            console.err.print(fault, style="red")
            faults += 1
    if faults:
        console.err.print(f"precalib: {directory} has {faults} fault{'s' * (faults > 1)}")
        raise typer.Exit(1)
    compared = "; errors and unquantized tensors agree with the source" if source else ""
    count = len(open_packed(directory).config.modules)
    console.out.print(
        f"{directory} is whole: files, structure and values of {count} packed weights are right"
        f"{compared}."
    )


@app.command()
def dequantize(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = DType.bfloat16,
    jobs: Annotated[int, typer.Option(help="Tensors at a time; 0: one per core.", min=0)] = 0,
) -> None:
    """Turn a packed checkpoint back into one that transformers loads."""
    jobs = jobs or len(os.sched_getaffinity(0))
    total = dequantize_workload(directory)
    with _resumable("run it again to continue"), console.progress_bar(total) as progress:
        size = run_dequantize(directory, target, getattr(torch, dtype.value), jobs, progress)
    console.out.print(f"{target}: {console.size(size)} of {dtype.value} weights.")


app.command()(tuning.tune)


@app.command("eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    against: Annotated[str, typer.Option(help="The source checkpoint: folder or Hugging Face id.")],
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to measure on.")
    ] = None,
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Let the original write the text: no data.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Tokens to take or to write.", min=2)] = 8192,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help='JSONL of {"query", "choices", "gold"}.'),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions to take of each file of tasks.", min=1)
    ] = None,
    begin_token: Annotated[
        bool,
        typer.Option(
            "--begin-token",
            help="Put the model's begin token before texts if its tokenizer doesn't.",
        ),
    ] = False,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Type to compute in. If not given: bfloat16, or float32 on a processor without "
            "bfloat16 arithmetic."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda:0.")] = "cpu",
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Compare a packed checkpoint with its source: KL, agreement, perplexity, tasks."""
    request = evaluation.Request(
        text or (),
        self_generated,
        tokens,
        tasks or (),
        limit,
        getattr(torch, dtype.value) if dtype else None,
        device,
        begin_token,
    )
    check_device(device)
    if json is not None:
        check_folder(json, "--json")
    result = evaluation.evaluate(
        directory, hub.locate(against), request, evaluation_tables.progress
    )
    evaluation_tables.show(result)
    if json is not None:
        write_json(json, result.to_json())


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file; NAME-report.html if not given.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The source checkpoint: draw the weights before, too.")
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Result of precalib eval --json; repeatable."),
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Draw these modules, not the worst of each kind."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Tensors at a time; 0: one per core.", min=0)] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE even if it is no report.")
    ] = False,
) -> None:
    """Show a packed checkpoint as an HTML page: sizes, errors, salient weights, evaluations."""
    request = Request(
        out or Path(f"{directory.resolve().name}-report.html"),
        hub.locate(against) if against else None,
        evaluations or (),
        tensor or (),
        jobs=jobs or len(os.sched_getaffinity(0)),
        force=force,
    )
    _report(directory, request)


app.command()(sharing.card)
app.command()(sharing.push)
app.command()(serving.bench)


@app.command()
def recipes() -> None:
    """List the recipes."""
    for name, recipe in RECIPES.items():
        default = " (default)" if name == DEFAULT else ""
        bits = recipe.layout.bits_per_weight(4096, 4096)
        title = Text(name, style="bold")
        console.out.print(
            title, f"{default}: {recipe.describe()}; {bits:.2f} effective bits", sep=""
        )


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show versions, the vLLM plugin, and which backends can run here and why."""
    if not diagnosis.run(json):
        raise typer.Exit(1)


@contextlib.contextmanager
def _resumable(how: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.err.print(f"precalib: interrupted; {how}")
        raise typer.Exit(130) from None


def _report(directory: Path, request: Request) -> None:
    stored = open_packed(directory).files.nbytes
    with console.progress_bar(stored) as progress:
        write_report(directory, request, progress)
    console.out.print(f"Report: {request.out}")


def _override(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"--override {text!r} is not of the form REGEX=RECIPE, as in 'down_proj=balanced-4'"
        )
    return pattern, name


def main() -> None:
    """Entry point: errors meant for the user become one sentence and exit code 1."""
    try:
        app()
    except PrecalibError as error:
        console.err.print(f"precalib: {error}", style="red")
        sys.exit(1)
    except (OSError, MemoryError, RuntimeError) as error:
        if memory.is_short(error):
            text = memory.SHORT
        elif isinstance(error, OSError):
            text = f"{error.filename}: " if error.filename else ""
            text += error.strerror or str(error)
        else:
            raise
        console.err.print(f"precalib: {text}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
