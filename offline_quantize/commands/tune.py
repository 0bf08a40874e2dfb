"""`precalib tune`: a packed checkpoint to one with better row and column scales."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.calibration.tune import RATE, Factors, Report, tune_factors
from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.manifest import (
    FileRecord,
    Manifest,
    RunRecord,
    WeightRecord,
    read_manifest,
)
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import OutputFiles, Run, State
from offline_quantize.checkpoint.safetensors_file import lay_out, tensor_bytes
from offline_quantize.checkpoint.source import CONFIG, INDEX, Checkpoint, open_checkpoint
from offline_quantize.checkpoint.writer import WriteJob, by_file, write_shards
from offline_quantize.evaluation.kl import generate_text
from offline_quantize.evaluation.models import load_original, load_packed
from offline_quantize.method.weight_statistics import Statistics
from precalib_kernels.errors import FormatError, SourceError, UsageError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout

SCALES = ("row_scale", "column_scale")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How scales are tuned.

    tokens: of text that the original writes;  window: tokens of one step.
    epochs: passes over the text;  rate: of Adam;  seed: of the text and the order of steps.
    """

    tokens: int = 8192
    window: int = 512
    epochs: int = 4
    rate: float = RATE
    seed: int = 0


def tune(
    directory: Path,
    target: Path,
    against: Path,
    tuning: Tuning,
    progress: Progress,
    *,
    device: str = "cpu",
    jobs: int = 1,
    report: Report = lambda _done, _steps, _kl: None,
) -> Manifest:
    """Write the packed checkpoint with tuned scales; all else of it is copied.

    against: the source checkpoint.
    report:  is told of every step.

    Raises PrecalibError; the target is then not a checkpoint (it has no config.json).
    """
    packed, manifest, source = open_packed(directory), read_manifest(directory), against
    checkpoint = open_checkpoint(source)
    modules = [module for module in packed.config.modules if is_tunable(packed.layout(module))]
    if not modules:
        raise UsageError(
            f"{directory}: no weight has both a row_scale and a column_scale to tune; "
            "quantize it with a balanced recipe"
        )
    factors = _factors(packed, source, modules, tuning, device, report)
    scales = {name: tensor for m in modules for name, tensor in _scaled(packed, m, factors[m])}
    record = _record(manifest.run, tuning)
    digest = hashlib.sha256()
    for name in sorted(scales):
        digest.update(tensor_bytes(scales[name]))
    fingerprint = {**record.to_json(), "scales": digest.hexdigest()}
    run = Run(target, directory, fingerprint, _output_files(packed), record)
    if run.state(resume=True) is State.FINISHED:
        run.clean_up()
        return read_manifest(target)
    with run.begin():
        batches = by_file(run, _write_jobs(packed, manifest, checkpoint, modules, scales))
        reports = write_shards(run, batches, jobs, progress)
        run.finish(progress, functools.partial(_manifest, manifest, record, reports))
    return read_manifest(target)


def is_tunable(layout: Layout) -> bool:
    """Whether all of a weight is proportional to a row scale and to a column scale."""
    salient = not layout.salient_count or layout.salient_grid == "row"
    return layout.scale == "log8" and layout.column_scale and salient


def _factors(
    packed: PackedCheckpoint,
    source: Path,
    modules: list[str],
    tuning: Tuning,
    device: str,
    report: Report,
) -> dict[str, Factors]:
    original = load_original(source, torch.bfloat16, device)
    windows = generate_text(original, tuning.tokens, tuning.window, tuning.seed)
    quantized = load_packed(packed.root, torch.bfloat16, device)
    return tune_factors(
        original,
        quantized,
        modules,
        windows,
        epochs=tuning.epochs,
        rate=tuning.rate,
        seed=tuning.seed,
        report=report,
    )


def _scaled(
    packed: PackedCheckpoint, module: str, factors: Factors
) -> Iterator[tuple[str, Tensor]]:
    """The new scales of a module; a factor whose scale leaves float16 is not used."""
    tensors = packed.tensors(module)
    for suffix, factor in zip(SCALES, (factors.row, factors.column), strict=True):
        before = tensors[suffix]
        after = (before.float() * factor.cpu().view(before.shape)).half()
        usable = after.isfinite() & ((after > 0) == (before > 0))
        yield f"{module}.{suffix}", torch.where(usable, after, before)


def _record(run: RunRecord, tuning: Tuning) -> RunRecord:
    tuned = {"precalib": version("vllm-precalib"), **dataclasses.asdict(tuning)}
    return RunRecord.model_validate({**run.to_json(), "tuned": tuned})


def _output_files(packed: PackedCheckpoint) -> OutputFiles:
    files = packed.files
    shards = {
        file: lay_out(
            {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in entries.items()},
            files.metadata[file],
        )
        for file, entries in files.shards.items()
    }
    metadata = {} if files.index is None else {INDEX: json_bytes(files.index)}
    metadata[CONFIG] = json_bytes(files.config)
    sidecar_files = {name: packed.root / name for name in files.sidecar_files}
    return OutputFiles(shards, sidecar_files, metadata)


def _write_jobs(
    packed: PackedCheckpoint,
    manifest: Manifest,
    source: Checkpoint,
    modules: list[str],
    scales: Mapping[str, Tensor],
) -> Iterator[WriteJob]:
    for name, location in packed.locations.items():
        if name not in scales:
            yield WriteJob.copy(location.path.name, location)
    for module in modules:
        names = [f"{module}.{suffix}" for suffix in SCALES]
        new = {name: scales[name] for name in names}
        origin = manifest.origin_of(module)
        if origin not in source.locations:
            raise SourceError(
                f"{source.root}: tensor '{origin}' is missing; this is not the source"
            )
        files = {packed.locations[name].path.name for name in names}
        if len(files) > 1:
            raise FormatError(f"{packed.root}: tensors of {module} are in several files")
        make = functools.partial(_measured, packed, module, new, source, origin)
        nbytes = sum(packed.locations[name].entry.nbytes for name in names)
        yield WriteJob(f"{module} scales", files.pop(), names, nbytes, make)


def _measured(
    packed: PackedCheckpoint,
    module: str,
    scales: Mapping[str, Tensor],
    source: Checkpoint,
    origin: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The new scales, and what they leave of the source's weight."""
    tensors = packed.tensors(module)
    tensors |= {suffix: scales[f"{module}.{suffix}"] for suffix in SCALES}
    original = source.locations[origin].read().float()
    weight = reference.dequantize(tensors, packed.layout(module), packed.shape(module)[1])
    if weight.shape != original.shape:
        raise SourceError(
            f"{source.root}: tensor '{origin}' has shape {list(original.shape)} instead of "
            f"{list(weight.shape)}; this is not the source"
        )
    statistics = Statistics(float(original.abs().max()), original.device)
    statistics.add(original, weight, 0, 0)
    report = statistics.summary()
    return dict(scales), {k: v for k, v in report.items() if not k.startswith("salient_")}


def _manifest(
    before: Manifest,
    record: RunRecord,
    reports: Mapping[str, Mapping[str, Any]],
    files: dict[str, FileRecord],
) -> Manifest:
    tensors: dict[str, WeightRecord] = {
        module: weight.model_copy(update=dict(reports.get(f"{module} scales", {})))
        for module, weight in before.tensors.items()
    }
    errors = [w.relative_error * w.shape[0] * w.shape[1] for w in tensors.values()]
    totals = before.totals.model_copy(
        update={"mean_relative_error": math.fsum(errors) / before.totals.weights}
    )
    return before.model_copy(
        update={"run": record, "tensors": tensors, "totals": totals, "files": files}
    )
