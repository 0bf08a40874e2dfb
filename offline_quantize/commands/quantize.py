"""`precalib quantize`: a checkpoint to a packed checkpoint."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.checkpoint import writer
from offline_quantize.checkpoint.atomic_files import MANIFEST
from offline_quantize.checkpoint.packed import read_manifest
from offline_quantize.checkpoint.safetensors_file import read_tensor
from offline_quantize.method.encode import encode
from offline_quantize.planning import selection
from offline_quantize.planning.plan import Plan, WeightPlan
from precalib_kernels.errors import UnfitError
from precalib_kernels.format.layout import FORMAT_VERSION, eq13_bits

SHOWN = 20  # tensors named with their errors, of those that cannot be quantized


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did: its manifest, and the seconds it took (None if all was there already)."""

    manifest: Mapping[str, Any]
    seconds: float | None


def quantize(
    plan: Plan,
    target: Path,
    progress: writer.Progress,
    jobs: int = 1,
    device: str = "cpu",
    resume: bool = False,
) -> Outcome:
    """Carry out a plan. The same plan gives the same bytes, whatever `jobs` and interruptions.

    Raises PrecalibError; the target then holds at most an unfinished run, which `resume` continues.
    An UnfitError names all weights that must be kept, and leaves nothing in the target.
    """
    start = time.monotonic()
    root = plan.source.root
    if is_finished(plan, target, device, resume):
        writer.clean_up(target)
        return Outcome(read_manifest(target), None)
    fingerprint = plan.fingerprint(torch.device(device).type)
    with writer.lock_output(target, fingerprint):
        tasks = _tasks(plan, device)
        try:
            reports = writer.write_shards(target, plan.shards, tasks, jobs, progress)
        except UnfitError as error:
            raise _refusal(plan, error.faults) from None
        carried = {name: root / name for name in plan.source.others}
        build = functools.partial(_manifest, plan, reports, fingerprint)
        writer.finish(target, carried, plan.small, build, plan.shards, progress)
    return Outcome(read_manifest(target), time.monotonic() - start)


def is_finished(plan: Plan, target: Path, device: str, resume: bool) -> bool:
    """Whether the target holds all of this run's work already; writes nothing.

    Raises OutputError when the run could not begin or go on there.
    """
    fingerprint = plan.fingerprint(torch.device(device).type)
    size = plan.output_bytes
    root = plan.source.root
    finished = writer.check_target(
        target, root, fingerprint, size, resume, completion_marker=MANIFEST
    )
    if finished:
        writer.refuse_other(target, read_manifest(target)["job"], _job(fingerprint))
    return finished


def _tasks(plan: Plan, device: str) -> Iterator[writer.WriteJob]:
    # the largest first, so that no thread is left alone with it
    packings = sorted(plan.packings.values(), key=lambda packing: -packing.entry.weights)
    for file, entries in plan.source.shards.items():
        path = plan.source.root / file
        for name, entry in entries.items():
            if name not in plan.packings:
                origin = (path, entry)
                yield writer.WriteJob(name, file, [name], entry.nbytes, origin=origin)
        for packing in packings:
            if packing.file == file:
                make = functools.partial(_pack, path, packing, device)
                nbytes = packing.entry.nbytes
                yield writer.WriteJob(packing.name, file, list(packing.outputs()), nbytes, make)


def _pack(path: Path, packing: WeightPlan, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight = read_tensor(path, packing.origin, packing.entry).to(device)
    encoded = encode(weight, packing.recipe, f"{path}: tensor '{packing.origin}'")
    tensors = {f"{packing.module}.{k}": v.cpu() for k, v in encoded.tensors.items()}
    return tensors, encoded.statistics.summary()


def _refusal(plan: Plan, faults: Mapping[str, str]) -> UnfitError:
    """What is wrong with the weights of these names, and the options that leave them out."""
    texts = [faults[name] for name in plan.packings if name in faults]
    one = len(texts) == 1
    remedies = []
    if any(plan.packings[name].origin != name for name in faults):
        remedies.append("leave out --head")  # it has no tensor of its own to keep
    if pattern := _keep_pattern(plan, faults):
        remedies.append(f"keep {'it' if one else 'them'} with --keep '{pattern}'")
    remedy = " and ".join(remedies)
    if one:
        return UnfitError(f"{texts[0]}; {remedy}", faults)
    lines = [f"{plan.source.root}: {len(texts)} tensors cannot be quantized; {remedy}"]
    lines += texts[:SHOWN]
    if len(texts) > SHOWN:
        lines.append(f"and {len(texts) - SHOWN} more")
    return UnfitError("\n  ".join(lines), faults)


def _keep_pattern(plan: Plan, names: Iterable[str]) -> str:
    """Pattern of the modules of these weights and of those that vLLM fuses with them; "" for none.

    A kind of module that is among them in all layers takes one term, so many make a short pattern.
    """
    sourced = [p for p in plan.packings.values() if p.name == p.origin]
    every = [packing.module for packing in sourced]
    wanted = {packing.module for packing in sourced if packing.name in set(names)}
    for parts in selection.fused_siblings(every):
        if wanted.intersection(parts):
            wanted.update(parts)
    kinds: dict[str, list[str]] = {}  # modules that differ in numbers alone
    for module in every:
        kinds.setdefault(re.sub(r"\d+", "0", module), []).append(module)
    terms = []
    for kind, modules in kinds.items():
        if len(modules) > 1 and wanted.issuperset(modules):
            terms.append(re.escape(kind).replace("0", r"\d+"))
        else:
            terms += [re.escape(module) for module in modules if module in wanted]
    if len(terms) < 2:
        return "".join(f"^{term}$" for term in terms)
    return f"^({'|'.join(terms)})$"


def _job(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint that does not depend on where and when the source was stored."""
    source = {
        name: {k: v for k, v in mark.items() if k != "modified"} if isinstance(mark, dict) else mark
        for name, mark in fingerprint["source"].items()
    }
    return {k: v for k, v in fingerprint.items() if k != "device"} | {"source": source}


def _manifest(
    plan: Plan,
    reports: Mapping[str, Mapping[str, Any]],
    fingerprint: Mapping[str, Any],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    tensors = {}
    for name, packing in plan.packings.items():
        rows, columns = packing.entry.shape
        layout = packing.recipe.layout
        tensors[packing.module] = {
            "file": packing.file,
            "origin": packing.origin,
            "shape": [rows, columns],
            "dtype": packing.entry.dtype,
            "recipe": packing.label,
            "bits_per_weight": layout.bits_per_weight(rows, columns),
            **reports[name],
        }
    source_bytes = sum(packing.entry.nbytes for packing in plan.packings.values())
    kept_bytes = sum(
        entry.nbytes
        for entries in plan.source.shards.values()
        for name, entry in entries.items()
        if name in plan.kept
    )
    errors = [
        (report["relative_error"], plan.packings[name].entry.weights)
        for name, report in reports.items()
        if name in plan.packings
    ]
    return {
        "format_version": FORMAT_VERSION,
        "precalib": version("vllm-precalib"),
        "job": _job(fingerprint),
        "totals": {
            "weights": plan.weights,
            "source_bytes": source_bytes,
            "stored_bytes": plan.stored_bytes,
            "kept_bytes": kept_bytes,
            "bits_per_weight": 8 * plan.stored_bytes / plan.weights,
            "eq13_bits_per_weight": _eq13(plan),
            "mean_relative_error": math.fsum(e * n for e, n in errors) / plan.weights,
            "salient_overflow": sum(tensor["salient_overflow"] for tensor in tensors.values()),
        },
        "files": files,
        "tensors": tensors,
        "kept": dict(plan.kept),
        "left_out": list(plan.source.left_out),
    }


def _eq13(plan: Plan) -> float:
    """Average bits by the paper's Eq. 13, to stand beside the true size."""
    total = math.fsum(
        eq13_bits(p.recipe.layout.bits, p.recipe.layout.group_size, p.recipe.alpha)
        * p.entry.weights
        for p in plan.packings.values()
    )
    return total / plan.weights
