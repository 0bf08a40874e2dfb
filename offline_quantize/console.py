"""What the commands show: progress, tables, plain sentences."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from offline_quantize.plan import Plan

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Quiet:
    """Progress that is not shown."""

    def begin(self, name: str) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""


class Bar(Quiet):
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
def progress_bar(total: int) -> Iterator[Quiet]:
    """A progress bar over `total` bytes on a terminal, nothing elsewhere."""
    if not err.is_terminal:
        yield Quiet()
        return
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield Bar(progress, total)


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def show_plan(plan: Plan) -> None:
    """Print what a run would do."""
    table = Table("recipe", "weights", "tensors", "true bits", "about", title=str(plan.source.root))
    by_label: dict[str, list[Any]] = {}
    for packing in plan.packings.values():
        by_label.setdefault(packing.label, []).append(packing)
    for label, packings in by_label.items():
        weights = sum(packing.entry.weights for packing in packings)
        stored = sum(p.recipe.layout.stored_bytes(*p.entry.shape) for p in packings)
        about = packings[0].recipe.about
        bits = f"{8 * stored / weights:.3f}"
        table.add_row(label, f"{weights:,}", str(len(packings)), bits, about)
    out.print(table)
    show_kept(plan.kept, plan.source.left_out)
    experts = sum(".experts." in packing.module for packing in plan.packings.values())
    if experts:
        out.print(
            f"Note: {experts} expert weights would be packed, which the vLLM plugin does not serve "
            r"yet; add --keep '\.experts\.' for a checkpoint to serve."
        )
    before = sum(entry.nbytes for shard in plan.source.shards.values() for entry in shard.values())
    out.print(
        f"Weight files {size(before)} → {size(sum(s.size for s in plan.shards.values()))}; "
        f"{8 * plan.stored_bytes / plan.weights:.3f} true bits per quantized weight.\n"
        f"Exact size of the output: {plan.output_bytes:,} bytes and the manifest precalib.json."
    )


def show_kept(kept: Mapping[str, str], left_out: Any) -> None:
    """Print what stays as it is, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in sorted(reasons.items()):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        out.print(f"Kept ({reason}): {shown}", highlight=False)
    if left_out:
        out.print(f"Left out (weights in another format): {', '.join(left_out)}", highlight=False)


def show_totals(totals: Mapping[str, Any], seconds: float | None = None) -> None:
    """Print the totals of a manifest."""
    took = "" if seconds is None else f" in {seconds:.1f} s"
    out.print(
        f"{totals['weights']:,} weights{took}: {size(totals['source_bytes'])} → "
        f"{size(totals['stored_bytes'])}, [bold]{totals['bits_per_weight']:.3f} true bits[/bold] "
        f"per weight (Eq. 13 of the paper: {totals['eq13_bits_per_weight']:.3f}), "
        f"relative error {totals['mean_relative_error']:.5f}; "
        f"{size(totals['kept_bytes'])} kept as they were."
    )
    if totals["salient_overflow"]:
        out.print(
            f"{totals['salient_overflow']:,} weights above λ' found no place in their group and "
            "were quantized as ordinary ones (a group holds a fixed number of salient weights)."
        )


def show_tensors(manifest: Mapping[str, Any]) -> None:
    """Print the per-tensor table of a manifest."""
    table = Table()
    table.add_column("module", no_wrap=True, overflow="fold")
    for name in ("shape", "bits", "rel. error", "KL", "entropy", "salient", "overflow"):
        table.add_column(name, justify="right", no_wrap=True)
    for module, tensor in manifest["tensors"].items():
        table.add_row(
            module,
            "×".join(str(n) for n in tensor["shape"]),
            f"{tensor['bits_per_weight']:.3f}",
            f"{tensor['relative_error']:.5f}",
            f"{tensor['kl']:.4f}",
            f"{tensor['entropy_before']:.2f}→{tensor['entropy_after']:.2f}",
            f"{100 * tensor['salient_share']:.2f} %",
            f"{tensor['salient_overflow']:,}",
        )
    out.print(table)
