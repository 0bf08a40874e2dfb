"""`precalib quantize`: a checkpoint to a packed checkpoint."""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import CARD, TRANSFORMS
from offline_quantize.checkpoint.manifest import (
    FileRecord,
    Manifest,
    Totals,
    WeightRecord,
    read_manifest,
)
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import Run, State
from offline_quantize.checkpoint.safetensors_file import read_tensor
from offline_quantize.checkpoint.source import check_unchanged
from offline_quantize.checkpoint.transforms import NO_TRANSFORMS, Transforms
from offline_quantize.checkpoint.worker_pool import WorkerPool, worker_pool
from offline_quantize.checkpoint.write_job import WriteJob
from offline_quantize.checkpoint.writer import by_file, write_shards
from offline_quantize.commands.value_output import transform_jobs
from offline_quantize.method.encode import encode
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.planning import selection
from offline_quantize.planning.plan import Plan, WeightPlan
from precalib_kernels.errors import PrecalibError, SourceError, UnfitError, UsageError
from precalib_kernels.format.layout import FORMAT_VERSION, eq13_bits

if TYPE_CHECKING:
    from offline_quantize.calibration.activations import Block

SHOWN = 20  # tensors named with their errors, of those that cannot be quantized


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did.

    seconds: it took, None if all was there already.
    unknown: weights that were quantized without knowing their inputs, in a run with activations.
    """

    manifest: Manifest
    seconds: float | None
    unknown: Sequence[str] = ()


def quantize(
    plan: Plan,
    target: Path,
    progress: Progress,
    jobs: int = 1,
    device: str = "cpu",
    resume: bool = False,
    cluster: str | None = None,
) -> Outcome:
    """Carry out a plan. The same plan gives the same bytes, whatever `jobs` and interruptions.

    jobs:    tensors worked on at once.
    cluster: address of a Ray cluster that works on as many as it has CPUs; None for this process.

    Raises PrecalibError; the target then holds at most an unfinished run, which `resume` continues.
    An UnfitError names all weights that must be kept, and leaves nothing in the target.
    """
    start = time.monotonic()
    run = run_of(plan, target, device)
    state = run.state(resume)
    if state is State.FINISHED:
        run.clean_up()
        if plan.options.card and not (target / CARD).exists():
            _write_card(plan, target)  # the run was killed when all but this was done
        return Outcome(read_manifest(target), None)
    with contextlib.ExitStack() as stack:
        pool = None if cluster is None else _cluster(cluster, stack)
        stack.enter_context(run.begin())
        try:
            batches, unknown = _batches(run, plan, device, progress, stack, cluster)
        except PrecalibError:
            if state is State.NEW:
                run.discard()
            raise
        try:
            workers = contextlib.nullcontext(pool) if pool else worker_pool(jobs)
            reports = write_shards(run, batches, workers, progress)
        except UnfitError as error:
            raise _refusal(plan, error.faults) from None
        try:
            check_unchanged(plan.source, run.fingerprint["source"])
        except SourceError:
            run.discard()
            raise
        run.finish(progress, functools.partial(_manifest, plan, reports), pool)
        if plan.options.card:
            _write_card(plan, target)
    return Outcome(read_manifest(target), time.monotonic() - start, unknown)


def check_cluster(address: str | None, jobs: int, device: str) -> None:
    """Raise UsageError for options that do not go with a Ray cluster."""
    if address is not None and jobs:
        raise UsageError("--jobs is for this machine's threads; leave it out with --ray")
    if address is not None and device != "cpu":
        raise UsageError("--ray computes on CPUs; leave out --device")


def _cluster(address: str, stack: contextlib.ExitStack) -> WorkerPool:
    from offline_quantize.checkpoint.ray_pool import ray_pool

    return stack.enter_context(ray_pool(address))


def _write_card(plan: Plan, target: Path) -> None:
    from offline_quantize.report.card import write_run_card

    write_run_card(target, plan.source.root)


def run_of(plan: Plan, target: Path, device: str) -> Run:
    """The run that carries out a plan."""
    fingerprint = plan.fingerprint(torch.device(device).type)
    return Run(target, plan.source.root, fingerprint, plan.files, plan.record())


def _batches(
    run: Run,
    plan: Plan,
    device: str,
    progress: Progress,
    stack: contextlib.ExitStack,
    cluster: str | None,
) -> tuple[Iterable[Sequence[WriteJob]], Sequence[str]]:
    """All jobs, and the weights of which nothing will be known in a run with activations."""
    options = plan.options.activations
    divided = by_file if cluster is None else _all_at_once
    if options is None:
        transforms = Transforms.of(run.target, plan.options.transform)
        first = transform_jobs(plan, transforms, device)
        return divided(run, [*first, *_write_jobs(plan, device, {}, transforms)]), ()
    from offline_quantize.calibration.observation import observation

    shapes = {name: weight.entry.shape for name, weight in plan.weight_plans.items()}
    opened = observation(plan.source, shapes, plan.head, options, device, progress)
    if options.feedback:
        seen = stack.enter_context(opened)
        blocks = stack.enter_context(contextlib.closing(seen.blocks()))
        return _by_block(plan, device, blocks), seen.unknown
    with opened as seen:
        inputs = seen.inputs()
    return divided(run, _write_jobs(plan, device, inputs)), seen.unknown


def _all_at_once(_: Run, jobs: Iterable[WriteJob]) -> Iterator[list[WriteJob]]:
    """Batches for a cluster, in which no worker waits for the end of a file.

    The transforms come first, which other jobs read.
    """
    transforms: list[WriteJob] = []
    others: list[WriteJob] = []
    for job in jobs:
        (transforms if job.file == TRANSFORMS else others).append(job)
    yield from (transforms, others)


def _by_block(plan: Plan, device: str, blocks: "Iterable[Block]") -> Iterator[list[WriteJob]]:
    """A batch for each block that went through the model, and one for all the rest."""
    done: set[str] = set()
    for _, inputs in blocks:
        weights = [plan.weight_plans[name] for name in inputs if name not in done]
        yield [_weight_job(plan, weight, device, inputs) for weight in _largest_first(weights)]
        done.update(inputs)
    yield [job for job in _write_jobs(plan, device, {}) if job.key not in done]


def _write_jobs(
    plan: Plan,
    device: str,
    inputs: Mapping[str, InputStatistics],
    transforms: Transforms = NO_TRANSFORMS,
) -> Iterator[WriteJob]:
    made = (
        {pair.bias for pair in plan.pairs} | plan.weight_plans.keys() | plan.expert_tensors.keys()
    )
    for location in plan.source.locations.values():
        if location.name not in made:
            yield WriteJob.copy(location.path.name, location)
    for weight in _largest_first(plan.weight_plans.values()):
        yield _weight_job(plan, weight, device, inputs, transforms)


def _largest_first(weights: Iterable[WeightPlan]) -> list[WeightPlan]:
    """The largest first, so that no thread is left alone with it."""
    return sorted(weights, key=lambda weight: -weight.entry.weights)


def _weight_job(
    plan: Plan,
    weight: WeightPlan,
    device: str,
    inputs: Mapping[str, InputStatistics],
    transforms: Transforms = NO_TRANSFORMS,
) -> WriteJob:
    path, known = plan.source.root / weight.file, inputs.get(weight.name)
    make = functools.partial(_pack, path, weight, device, known, transforms)
    return WriteJob(weight.name, weight.file, list(weight.outputs()), weight.entry.nbytes, make)


def _pack(
    path: Path,
    plan: WeightPlan,
    device: str,
    inputs: InputStatistics | None,
    transforms: Transforms,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight = transforms.apply(plan.origin, read_tensor(path, plan.origin, plan.entry).to(device))
    encoded = encode(weight, plan.recipe, f"{path}: tensor '{plan.origin}'", inputs)
    tensors = {f"{plan.module}.{k}": v.cpu() for k, v in encoded.tensors.items()}
    return tensors, encoded.statistics.summary()


def _refusal(plan: Plan, faults: Mapping[str, str]) -> UnfitError:
    """What is wrong with the weights of these names, and the options that leave them out."""
    texts = [faults[name] for name in plan.weight_plans if name in faults]
    one = len(texts) == 1
    remedies = []
    if any(plan.weight_plans[name].origin != name for name in faults):
        remedies.append("leave out --head")  # it has no tensor of its own to keep
    inputs = [name for name in faults if _is_embeddings(plan, name)]
    if inputs:
        remedies.append("leave out --embeddings")
    if pattern := _keep_pattern(plan, faults.keys() - inputs):
        remedies.append(f"keep {'it' if one else 'them'} with --keep '{pattern}'")
    remedy = " and ".join(remedies)
    if one:
        return UnfitError(f"{texts[0]}; {remedy}", faults)
    lines = [f"{plan.source.root}: {len(texts)} tensors cannot be quantized; {remedy}"]
    lines += texts[:SHOWN]
    if len(texts) > SHOWN:
        lines.append(f"and {len(texts) - SHOWN} more")
    return UnfitError("\n  ".join(lines), faults)


def _is_embeddings(plan: Plan, name: str) -> bool:
    return bool(selection.EMBEDDINGS.search(plan.weight_plans[name].module))


def _keep_pattern(plan: Plan, names: Iterable[str]) -> str:
    """Pattern of the modules of these weights and of those that vLLM fuses with them; "" for none.

    A kind of module that is among them in all layers takes one term, so many make a short pattern.
    """
    sourced = [weight for weight in plan.weight_plans.values() if weight.name == weight.origin]
    every = [weight.module for weight in sourced]
    wanted = {weight.module for weight in sourced if weight.name in set(names)}
    for shards in (*selection.fused_siblings(every), *selection.expert_layers(every).values()):
        if wanted.intersection(shards):
            wanted.update(shards)
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


def _manifest(
    plan: Plan, reports: Mapping[str, Mapping[str, Any]], files: dict[str, FileRecord]
) -> Manifest:
    weight_plans = plan.weight_plans
    tensors = {
        weight.module: _weight_record(weight, reports[name])
        for name, weight in weight_plans.items()
    }
    unquantized_bytes = sum(
        location.entry.nbytes
        for name, location in plan.source.locations.items()
        if name in plan.unquantized
    )
    errors = [
        report["relative_error"] * weight_plans[name].entry.weights
        for name, report in reports.items()
        if name in weight_plans
    ]
    return Manifest(
        format_version=FORMAT_VERSION,
        precalib=version("vllm-precalib"),
        run=plan.record(),
        totals=Totals(
            weights=plan.weights,
            source_bytes=sum(weight.entry.nbytes for weight in weight_plans.values()),
            stored_bytes=plan.stored_bytes,
            unquantized_bytes=unquantized_bytes,
            bits_per_weight=8 * plan.stored_bytes / plan.weights,
            eq13_bits_per_weight=_eq13(plan),
            mean_relative_error=math.fsum(errors) / plan.weights,
            salient_overflow=sum(tensor.salient_overflow for tensor in tensors.values()),
        ),
        files=files,
        tensors=tensors,
        unquantized=dict(plan.unquantized),
        skipped_files=list(plan.source.skipped_files),
    )


def _weight_record(weight: WeightPlan, report: Mapping[str, Any]) -> WeightRecord:
    rows, columns = weight.entry.shape
    return WeightRecord(
        file=weight.file,
        origin=weight.origin,
        shape=(rows, columns),
        dtype=weight.entry.dtype,
        recipe=weight.label,
        bits_per_weight=weight.recipe.layout.bits_per_weight(rows, columns),
        **report,
    )


def _eq13(plan: Plan) -> float:
    """Average bits by the paper's Eq. 13, to stand beside the effective bits."""
    total = math.fsum(
        eq13_bits(weight.recipe.layout.bits, weight.recipe.layout.group_size, weight.recipe.alpha)
        * weight.entry.weights
        for weight in plan.weight_plans.values()
    )
    return total / plan.weights
