"""`precalib tune`: row and column scales of a packed checkpoint, tuned on the original's own text.

Codes and sizes stay. A factor for each row and each column of a weight is found by gradient on the
KL divergence to the original, over text that the original writes, and the scales that the format
stores are multiplied by it. More of that text, which nothing was learnt from, says whether it
helped; if not, nothing is written.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offline_quantize.checkpoint.atomic_files import CARD, JOB, json_bytes
from offline_quantize.checkpoint.expert_slices import with_slices
from offline_quantize.checkpoint.manifest import (
    FileRecord,
    Manifest,
    RunRecord,
    WeightRecord,
    read_manifest,
)
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import OutputFiles, Run, State, check_place
from offline_quantize.checkpoint.safetensors_file import TensorLocation, lay_out
from offline_quantize.checkpoint.source import (
    CONFIG,
    INDEX,
    Checkpoint,
    check_suitable,
    check_unchanged,
    index_of,
    open_checkpoint,
)
from offline_quantize.checkpoint.worker_pool import worker_pool
from offline_quantize.checkpoint.write_job import WriteJob
from offline_quantize.checkpoint.writer import by_file, write_shards
from offline_quantize.commands.verify import check_files
from offline_quantize.method.weight_statistics import Statistics, errors_agree, relative_error
from offline_quantize.report.card_metadata import is_ours
from precalib_kernels.errors import OutputError, SourceError, UsageError

if TYPE_CHECKING:
    from offline_quantize.calibration.scale_tuning import Factors

TOKENS = 16_384


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What tuning did.

    before, after: KL(original ‖ quantized) in nats per token of the text held out.
    seconds:       the whole took.
    """

    before: float
    after: float
    seconds: float


def tune(
    directory: Path,
    target: Path,
    against: Path,
    progress: Progress,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> Tuning:
    """Write the packed checkpoint with tuned scales; equal calls on a machine write equal bytes.

    target:  folder to write; must be new.
    against: the checkpoint that was quantized.
    tokens:  of the text to learn from, which the original writes.

    Raises PrecalibError: for what `verify` finds without the source, when transformers cannot run
    the model, when memory is too small for two models, and when KL on the text held out does not
    fall. Nothing is written then.
    """
    from offline_quantize.calibration import own_text_tuning as learning
    from offline_quantize.evaluation.models import empty_model

    start = time.monotonic()
    packed, manifest, source = open_packed(directory), read_manifest(directory), _source(against)
    if tokens < learning.STEP:
        raise UsageError(f"--tokens {tokens}: give at least {learning.STEP}")
    _check_tunable(packed, manifest)
    check_place(target, against)
    originals = _originals(packed, manifest, source)
    record = manifest.run.model_copy(update={"tuned": {"tokens": tokens}})
    fingerprint = {**record.to_json(), "packed": packed.files.fingerprint()}
    run = Run(target, directory, fingerprint, _output_files(packed, manifest), record)
    _begin_anew(run)
    empty_model(source.root)  # raises if transformers is missing or has no such model
    learning.check_memory(source, device)
    check_files(packed, manifest, progress)
    _check_values(packed, manifest, originals, progress)
    with run.begin():
        try:
            factors, before, after = learning.learn_factors(
                packed, source.root, tokens, device, progress
            )
            if not after < before:
                raise UsageError(
                    f"{directory}: tuned scales do not help on held-out text (KL {before:.4f} "
                    f"before, {after:.4f} after), so nothing was written; give more --tokens, or "
                    "leave it as it is"
                )
            jobs = by_file(run, _write_jobs(packed, originals, factors))
            reports = write_shards(run, jobs, worker_pool(1), progress)
            check_unchanged(packed.files, fingerprint["packed"])
            run.finish(progress, functools.partial(_manifest, manifest, record, reports))
        except BaseException:
            run.discard()  # what was learnt is lost, so nothing could go on from it
            raise
        if is_ours(directory / CARD):
            from offline_quantize.report.card import write_run_card

            write_run_card(target, against)
    return Tuning(before, after, time.monotonic() - start)


def workload(directory: Path) -> int:
    """Bytes that `tune` reports progress on. Raises PrecalibError as it does."""
    files = read_manifest(directory).files.values()
    return open_packed(directory).files.nbytes + 2 * sum(file.size for file in files)


def _source(against: Path) -> Checkpoint:
    source = open_checkpoint(against)
    check_suitable(source)
    return source


def _check_tunable(packed: PackedCheckpoint, manifest: Manifest) -> None:
    """Raise UsageError for a checkpoint that was tuned or whose weights were transformed."""
    if manifest.run.tuned is not None:
        raise UsageError(f"{packed.root}: its scales were tuned before; tune what it was made from")
    if manifest.run.transform is not None:
        raise UsageError(
            f"{packed.root}: was made with --transform, after which scales cannot be tuned; "
            "quantize the model without it"
        )


def _originals(
    packed: PackedCheckpoint, manifest: Manifest, source: Checkpoint
) -> dict[str, TensorLocation]:
    """The weight that each packed module was made from. Raises SourceError for another source."""
    locations = with_slices(source.locations, packed.config.expert_tensors)
    found = {}
    for module in packed.config.modules:
        name, shape = manifest.origin_of(module), packed.shape(module)
        if name not in locations or locations[name].entry.shape != shape:
            raise SourceError(
                f"{source.root}: has no tensor '{name}' of shape {list(shape)}; give the "
                f"checkpoint that {packed.root} was made from"
            )
        found[module] = locations[name]
    return found


def _check_values(
    packed: PackedCheckpoint,
    manifest: Manifest,
    originals: Mapping[str, TensorLocation],
    progress: Progress,
) -> None:
    """Raise SourceError if a weight is not the one that was quantized."""
    for module, location in originals.items():
        progress.begin(module)
        error = relative_error(location.read().float(), packed.weight(module))
        if not errors_agree(error, manifest.tensors[module].relative_error):
            raise SourceError(
                f"{location.path}: tensor '{location.name}' is not the one that {packed.root} was "
                "made from; give the checkpoint that was quantized"
            )


def _begin_anew(run: Run) -> None:
    """Remove what a run that was killed left in the target.

    Raises OutputError as `Run.state` does, and for a target that another process writes.
    """
    unfinished = (run.target / JOB).exists()
    state = run.state(resume=unfinished)
    if unfinished:
        with run.begin():  # nobody else writes there
            if state is State.FINISHED:
                run.clean_up()
                raise OutputError(f"{run.target}: holds the tuned checkpoint already")
            run.discard()


def _output_files(packed: PackedCheckpoint, manifest: Manifest) -> OutputFiles:
    """Every file that was written with the packed checkpoint, but for the values of scales.

    Others that lie there now, such as results of an evaluation, say nothing of this one.
    """
    files = packed.files
    shards = {
        name: lay_out(
            {tensor: (e.dtype, e.shape, e.nbytes) for tensor, e in entries.items()},
            files.metadata[name],
        )
        for name, entries in files.shards.items()
    }
    sidecar_files = {name for name in files.sidecar_files if name in manifest.files}
    if is_ours(packed.root / CARD):
        sidecar_files.discard(CARD)
    metadata_files: dict[str, bytes] = {}
    if files.index is not None:
        metadata_files[INDEX] = json_bytes(index_of(shards, files.index))
    metadata_files[CONFIG] = json_bytes(dict(files.config))
    return OutputFiles(
        shards, {name: packed.root / name for name in sorted(sidecar_files)}, metadata_files
    )


def _write_jobs(
    packed: PackedCheckpoint,
    originals: Mapping[str, TensorLocation],
    factors: "Mapping[str, Factors]",
) -> Iterator[WriteJob]:
    tuned: set[str] = set()
    for module, found in factors.items():
        names = packed.stored_names(module)
        tuned.update(names)
        file, nbytes = packed.locations[names[0]].path.name, packed.stored_bytes(module)
        make = functools.partial(_make, packed, module, found, originals[module])
        yield WriteJob(module, file, names, nbytes, make)
    for name, location in packed.locations.items():
        if name not in tuned:
            yield WriteJob.copy(location.path.name, location)


def _make(
    packed: PackedCheckpoint, module: str, factors: "Factors", location: TensorLocation
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from offline_quantize.calibration.own_text_tuning import dequantized, scaled

    tensors, original = scaled(packed, module, factors), location.read().float()
    statistics = Statistics(float(original.abs().max()), original.device)
    statistics.add(original, dequantized(packed, module, tensors), salient=0, overflow=0)
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}, statistics.summary()


def _manifest(
    before: Manifest,
    record: RunRecord,
    reports: Mapping[str, Mapping[str, Any]],
    files: dict[str, FileRecord],
) -> Manifest:
    """The manifest, with what is measured anew of the tuned weights."""
    measured = ("relative_error", "kl", "entropy_after")

    def renewed(module: str, weight: WeightRecord) -> WeightRecord:
        found = reports.get(module)
        if found is None:
            return weight
        return weight.model_copy(update={name: found[name] for name in measured})

    tensors = {module: renewed(module, weight) for module, weight in before.tensors.items()}
    errors = [w.relative_error * math.prod(w.shape) for w in tensors.values()]
    totals = before.totals.model_copy(
        update={"mean_relative_error": math.fsum(errors) / before.totals.weights}
    )
    return before.model_copy(
        update={
            "precalib": version("vllm-precalib"),
            "run": record,
            "totals": totals,
            "files": files,
            "tensors": tensors,
        }
    )
