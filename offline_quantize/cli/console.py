"""What the commands show: progress, tables, plain sentences."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from offline_quantize.checkpoint.manifest import Manifest
from offline_quantize.checkpoint.model_size import ModelSize
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.planning import heads, selection
from offline_quantize.planning.activation_options import describe
from offline_quantize.planning.plan import Plan, WeightPlan
from offline_quantize.planning.weight_choice import unknown_experts
from offline_quantize.units import natural
from offline_quantize.units import size as size


class PlainConsole(Console):
    """A console on which text moves no cursor and sends no commands to the terminal.

    Names of files and tensors come from checkpoints of unknown origin.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with a mark in place of each control character but line ends and tabs."""
        return super().render_str(CONTROL.sub("�", text), **options)


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
# nothing is markup: names and paths may hold brackets
out = PlainConsole(soft_wrap=True, markup=False, highlight=False, emoji=False)
err = PlainConsole(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
WORTH_PACKING = 0.2  # share of the weights from which embeddings are pointed at
FILE_WIDTH = 1000  # of tables that go to a file or pipe: as wide as they need


class ProgressBar(NullProgress):
    """A bar with bytes, the current tensor and the time left."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total)

    def begin(self, name: str) -> None:
        """Show the tensor that is being worked on."""
        self.progress.update(self.task, description=name)

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        self.progress.advance(self.task, nbytes)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[NullProgress]:
    """A progress bar over `total` bytes on a terminal, nothing elsewhere."""
    if not err.is_terminal:
        yield NullProgress()
        return
    columns = (
        BarColumn(bar_width=16),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield ProgressBar(progress, total)


def new_table(heading: str, *numbers: str, no_wrap: bool = False) -> Table:
    """A table in the style of all commands.

    heading: of the first column, whose text is folded where it is too wide.
    numbers: headings of the right-aligned columns after it.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(heading, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


def show_table(table: Table) -> None:
    """Print a table: within a terminal's width, elsewhere as wide as it needs."""
    if out.is_terminal:
        out.print(table, soft_wrap=False)
    else:
        PlainConsole(file=out.file, width=FILE_WIDTH, markup=False).print(table)


def show_plan(plan: Plan) -> None:
    """Print what a run would do."""
    table = new_table("recipe", "weights", "tensors", "effective bits", no_wrap=True)
    table.add_column("about")
    by_label: dict[str, list[WeightPlan]] = {}
    for weight_plan in plan.weight_plans.values():
        by_label.setdefault(weight_plan.label, []).append(weight_plan)
    for label, weight_plans in by_label.items():
        weights = sum(weight_plan.entry.weights for weight_plan in weight_plans)
        stored = sum(weight_plan.stored_bytes for weight_plan in weight_plans)
        bits = f"{8 * stored / weights:.3f}"
        about = weight_plans[0].recipe.describe()
        table.add_row(label, f"{weights:,}", f"{len(weight_plans):,}", bits, about)
    show_table(table)
    show_unquantized(plan.unquantized, plan.source.skipped_files)
    show_notes(plan)
    before = size(plan.source.nbytes)
    also = ", and the card README.md" if plan.options.card else ""
    out.print(
        f"Weight files {before} → {size(sum(s.size for s in plan.files.shards.values()))}; "
        f"{8 * plan.stored_bytes / plan.weights:.3f} effective bits per quantized weight.\n"
        f"Exact size of the output: {plan.output_bytes:,} bytes and the manifest "
        f"precalib.json{also}."
    )
    show_model_size(plan.model_size)


def show_model_size(whole: ModelSize) -> None:
    """Print the effective bits of the whole model, and how much of it stays as it was."""
    out.print(
        f"Whole model: {whole.bits:.3f} effective bits per weight; "
        f"{whole.share(whole.unquantized)} of its {whole.weights:,} weights stay unquantized."
    )


def show_notes(plan: Plan) -> None:
    """Say so when the source's files contradict each other, and of parts that serve badly."""
    for note in plan.source.notes:
        out.print(f"Note: {note}.")
    if experts := unknown_experts(plan.unquantized):
        weights = sum(plan.source.locations[name].entry.weights for name in experts)
        out.print(
            f"Note: {plan.model_size.share(weights)} of the model's weights stay unquantized as "
            f"experts in 3-D tensors, whose form is not known for model type "
            f"{plan.source.text_config.get('model_type')!r}. vLLM can quantize them as it loads "
            "them (docs/mixtures.md)."
        )
    share, saved = heads.saved_by_embeddings(plan.source, plan.unquantized)
    if share > WORTH_PACKING:
        out.print(
            f"Note: embeddings are {share:.0%} of the weights and stay unquantized; "
            f"--embeddings {heads.EMBEDDINGS_RECIPE} would save {size(saved)}."
        )
    for weight in plan.weight_plans.values():
        head = selection.HEAD.search(weight.module)
        if (head or selection.EMBEDDINGS.search(weight.module)) and weight.recipe.layout.bits == 2:
            out.print(
                f"Note: {weight.module} gets 2-bit codes, whose error costs far more there than in "
                f"other weights; prefer --{'head' if head else 'embeddings'} balanced-4."
            )


def show_activations(plan: Plan, reason: str | None, unknown: Sequence[str] = ()) -> None:
    """Say what goes through the model before it is quantized, or why nothing does.

    reason:  why a pass that was not asked for is left out, None if it is not.
    unknown: weights of which the inputs stay unknown all the same.
    """
    if reason:
        out.print(f"Note: quantized without a forward pass, so outputs will differ more. {reason}")
    if plan.options.activations is None:
        return
    out.print(f"Inputs of layers: known from {describe(plan.options.activations.to_json())}.")
    if unknown:
        out.print(
            f"Note: the inputs of {len(unknown):,} weights stay unknown, as transformers has no "
            f"linear layer of that name: {unknown[0]}{' …' if len(unknown) > 1 else ''}"
        )


def show_unquantized(unquantized: Mapping[str, str], skipped_files: Sequence[str]) -> None:
    """Print the tensors that stay as they are, by reason, and the files that are not copied."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unquantized.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in sorted(reasons.items()):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
        out.print(f"Kept ({reason}): {shown}")
    if skipped_files:
        out.print(f"Left out (a server needs none of them): {', '.join(skipped_files)}")


def show_totals(manifest: Manifest, seconds: float | None = None) -> None:
    """Print the totals of a manifest."""
    totals = manifest.totals
    took = "" if seconds is None else f" in {seconds:.1f} s"
    out.print(
        f"{totals.weights:,} weights{took}: ",
        Text(f"{totals.bits_per_weight:.3f} effective bits", style="bold"),
        f" per weight (Eq. 13 of the paper: {totals.eq13_bits_per_weight:.3f}), "
        f"relative error {totals.mean_relative_error:.5f}.",
        sep="",
    )
    out.print(
        f"All tensors {size(manifest.bytes_before)} → {size(manifest.bytes_after)}: "
        f"{size(totals.stored_bytes)} packed, {size(totals.unquantized_bytes)} kept as they were."
    )
    if totals.salient_overflow:
        out.print(
            f"{totals.salient_overflow:,} weights above λ' found no place in their group and "
            "were quantized as non-salient ones (a group holds a fixed number of salient weights)."
        )


def show_tensors(manifest: Manifest) -> None:
    """Print the per-tensor table of a manifest by layer; overflow only where there is any."""
    overflow = bool(manifest.totals.salient_overflow)
    headings = ["shape", "bits", "error", "KL", "entropy", "salient"]
    headings += ["overflow"] if overflow else []
    table = new_table("module", *headings, no_wrap=True)
    for module in sorted(manifest.tensors, key=natural):
        tensor = manifest.tensors[module]
        cells = [
            module,
            "×".join(str(n) for n in tensor.shape),
            f"{tensor.bits_per_weight:.3f}",
            f"{tensor.relative_error:.5f}",
            f"{tensor.kl:.2f}",
            f"{tensor.entropy_before:.2f}→{tensor.entropy_after:.2f}",
            f"{100 * tensor.salient_share:.2f} %",
        ]
        table.add_row(*cells, *([f"{tensor.salient_overflow:,}"] if overflow else []))
    show_table(table)
    out.print(
        "bits: effective bits per weight.  error: ‖W − Ŵ‖² / ‖W‖².  KL, entropy: of 256-bin "
        "histograms of the weights before and after, in nats and bits."
    )
