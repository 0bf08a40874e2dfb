"""What a report shows, gathered from a packed checkpoint, its source and its evaluations."""

import dataclasses
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from offline_quantize.checkpoint.expert_slices import with_slices
from offline_quantize.checkpoint.manifest import Manifest, WeightRecord, read_manifest
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.checkpoint.transforms import Original, Transforms
from offline_quantize.checkpoint.worker_pool import worker_pool
from offline_quantize.planning.selection import LAYER
from offline_quantize.report import Request
from offline_quantize.report.evaluations import Evaluation, read_evaluation
from offline_quantize.report.measure import Histogram, Positions, histogram, positions
from offline_quantize.report.serving import Serving, served_by, this_device
from precalib_kernels.backends.registry import BackendRegistry, default_registry
from precalib_kernels.errors import FormatError, SourceError, UsageError

MOST_PICTURES = 48  # each is about 20 kB of SVG


@dataclasses.dataclass(frozen=True)
class Weight:
    """One packed weight: what the manifest says of it, and where its salient weights are.

    layer, kind: of "model.layers.3.mlp.down_proj": 3 and "mlp.down_proj"; numbers of experts
                 are "*" in a kind.
    measures:    what the manifest records.
    """

    module: str
    layer: int
    kind: str
    recipe: str
    shape: tuple[int, int]
    measures: WeightRecord
    positions: Positions | None

    @property
    def error(self) -> float:
        """‖W − Ŵ‖² / ‖W‖²."""
        return self.measures.relative_error

    @property
    def overflow_share(self) -> float:
        """Share of the weights that are above λ' but found no place in their group."""
        rows, columns = self.shape
        return self.measures.salient_overflow / (rows * columns)


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything a report shows.

    weights:     in the order of the files.
    pictures:    weights to draw, worst first, and their histograms.
    compared:    whether the source was at hand.
    serving:     which backends would serve the weights, on this machine's `device`.
    """

    packed: PackedCheckpoint
    manifest: Manifest
    weights: Sequence[Weight]
    pictures: Sequence[tuple[Weight, Histogram]]
    evaluations: Sequence[Evaluation]
    compared: bool
    seconds: float | None
    serving: Sequence[Serving]
    device: str


def gather(
    directory: Path,
    request: Request,
    progress: Progress,
    registry: BackendRegistry | None = None,
) -> Contents:
    """Read a packed checkpoint, and what the request names beside it.

    registry: the backends that may serve it; None for those that need no inference engine.

    Raises PrecalibError as `write_report` does.
    """
    packed, manifest = open_packed(directory), read_manifest(directory)
    if odd := sorted(manifest.tensors.keys() ^ packed.config.modules.keys()):
        raise FormatError(
            f"{directory}: {odd[0]} is not both in config.json and in precalib.json; "
            "see 'precalib verify'"
        )
    evaluations = [read_evaluation(path, directory) for path in request.evaluations]
    recorded = manifest.tensors
    origins = _origins(request.against, packed, manifest) if request.against else {}
    kind_of = kinds(recorded)
    chosen = _chosen(recorded, kind_of, request.tensors)

    def examine(module: str) -> Weight:
        progress.begin(module)
        label, shape = packed.config.modules[module], packed.shape(module)
        where = positions(packed, module)
        weight = Weight(module, *kind_of[module], label, shape, recorded[module], where)
        progress.advance(packed.stored_bytes(module))
        return weight

    with worker_pool(request.jobs) as pool:
        weights = list(pool.map(examine, recorded))
    by_module = {weight.module: weight for weight in weights}
    pictures = []
    for module in chosen:
        progress.begin(module)
        spread = histogram(packed, module, origins.get(module), by_module[module].error)
        pictures.append((by_module[module], spread))
    progress.begin("backends of this machine")  # compiling them can take minutes
    device = this_device()
    serving = served_by(packed, registry or default_registry(), device)
    return Contents(
        packed,
        manifest,
        weights,
        pictures,
        evaluations,
        request.against is not None,
        request.seconds,
        serving,
        device,
    )


def kinds(modules: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Layer and kind of every module: (3, "mlp.up_proj") of "model.layers.3.mlp.up_proj".

    Numbers of experts become "*". Where there is more than one stack of layers, a kind begins
    with the stack's name.
    """
    found = {module: LAYER.search(f"{module}.") for module in modules}
    stacks = {module[: match.start()] for module, match in found.items() if match}
    result = {}
    for module, match in found.items():
        stack, layer, inner = "", -1, module
        if match:
            stack, layer, inner = module[: match.start()], int(match[1]), module[match.end() :]
        inner = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inner) or "weight"
        result[module] = layer, f"{stack}.{inner}".strip(".") if len(stacks) > 1 else inner
    return result


def ratios(weights: Sequence[Weight]) -> list[float]:
    """Error of every weight as a multiple of the median of its recipe."""
    errors: dict[str, list[float]] = {}
    for weight in weights:
        errors.setdefault(weight.recipe, []).append(weight.error)
    medians = {recipe: statistics.median(values) for recipe, values in errors.items()}
    return [w.error / medians[w.recipe] if medians[w.recipe] else 1.0 for w in weights]


def _chosen(
    recorded: Mapping[str, WeightRecord],
    kind_of: Mapping[str, tuple[int, str]],
    patterns: Sequence[str],
) -> list[str]:
    """Modules to draw, worst first: those that a pattern matches, or the worst of each kind."""
    worst_first = sorted(recorded, key=lambda module: -recorded[module].relative_error)
    if not patterns:
        worst: dict[str, str] = {}
        for module in worst_first:
            worst.setdefault(kind_of[module][1], module)
        return list(worst.values())[:MOST_PICTURES]
    found = set()
    for text in patterns:
        try:
            matches = {module for module in recorded if re.search(text, module)}
        except re.error as error:
            raise UsageError(
                f"--tensor {text!r} is not a regular expression ({error}); quote it for the shell"
            ) from error
        if not matches:
            raise UsageError(
                f"--tensor {text!r} matches no packed module; "
                "compare it with the names that 'precalib inspect' shows"
            )
        found |= matches
    if len(found) > MOST_PICTURES:
        raise UsageError(
            f"--tensor matches {len(found)} modules, and at most {MOST_PICTURES} can be drawn; "
            "narrow the pattern"
        )
    return [module for module in worst_first if module in found]


def _origins(against: Path, packed: PackedCheckpoint, manifest: Manifest) -> dict[str, Original]:
    found = with_slices(open_checkpoint(against).locations, packed.config.expert_tensors)
    transforms = Transforms.of(packed.root, manifest.run.transform)
    origins = {}
    for module in packed.config.modules:
        name = manifest.origin_of(module)
        if name not in found:
            raise SourceError(
                f"{against}: tensor '{name}' is missing; "
                "give --against the checkpoint that was quantized"
            )
        if (there := found[name].entry.shape) != (here := packed.shape(module)):
            raise SourceError(
                f"{against}: tensor '{name}' has shape {list(there)} instead of "
                f"{list(here)}; give --against the checkpoint that was quantized"
            )
        origins[module] = Original(found[name], transforms)
    return origins
