"""The plan of a run: what happens to every tensor and what every output file will look like.

It is made from headers alone, so all that can be wrong is found before a byte is written, and the
sizes it tells are exact.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from offline_quantize.checkpoint.atomic_files import CARD, json_bytes
from offline_quantize.checkpoint.manifest import RunRecord
from offline_quantize.checkpoint.model_size import ModelSize
from offline_quantize.checkpoint.run import OutputFiles
from offline_quantize.checkpoint.safetensors_file import NAMES, Entry, FileLayout, lay_out
from offline_quantize.checkpoint.source import (
    CONFIG,
    INDEX,
    Checkpoint,
    check_suitable,
    index_of,
)
from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import families, heads, selection, value_output
from offline_quantize.planning.checks import (
    check_collisions,
    check_family,
    check_fused,
    check_type,
)
from offline_quantize.planning.options import Options, RecipeResolver
from offline_quantize.planning.weight_choice import choose_weights
from precalib_kernels.errors import FormatError, RecipeError, SourceError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.expert_tensors import ExpertTensor
from precalib_kernels.format.layout import FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """A weight to quantize: where it is, and under which recipe.

    name:   of the tensor that it is, ending in ".weight".
    origin: the tensor of the source it is made from: another one for a head tied to embeddings.
    """

    name: str
    origin: str
    file: str
    entry: Entry
    label: str
    recipe: Recipe

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that replace the weight."""
        return self.recipe.layout.stored_bytes(*self.entry.shape)

    @property
    def module(self) -> str:
        """Name of the module that owns the weight."""
        return selection.module_of(self.name)

    def outputs(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Type, shape and bytes of each tensor that replaces the weight."""
        rows, columns = self.entry.shape
        return {
            f"{self.module}.{suffix}": (NAMES[spec.dtype], spec.shape, spec.nbytes)
            for suffix, spec in self.recipe.layout.tensors(rows, columns).items()
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a run will do.

    weight_plans: weights to quantize, by name.
    unquantized:  why each other tensor stays as it is, by name.
    files:        every output file but the manifest and the card.
    pairs:        what a value–output transform takes; empty without one.
    tied:         heads that use the tensors of packed embeddings, module by module.
    expert_tensors: 3-D tensors of the source whose matrices are quantized, by name.
    """

    source: Checkpoint
    options: Options
    weight_plans: Mapping[str, WeightPlan]
    unquantized: Mapping[str, str]
    files: OutputFiles
    pairs: Sequence[value_output.ValueOutputPair] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expert_tensors: Mapping[str, ExpertTensor] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(plan.entry.weights for plan in self.weight_plans.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that replace a weight."""
        return sum(plan.stored_bytes for plan in self.weight_plans.values())

    @property
    def head(self) -> str | None:
        """Name of the weight that logits are computed with, if it is quantized."""
        modules = {weight.module: name for name, weight in self.weight_plans.items()}
        own = (name for module, name in modules.items() if selection.HEAD.search(module))
        return next(own, next((modules[other] for other in self.tied.values()), None))

    @property
    def model_size(self) -> ModelSize:
        """Of the whole model as it will be."""
        locations = self.source.locations
        others = (locations[name].entry for name in self.unquantized)
        return ModelSize.of(self.weights, self.stored_bytes, others)

    @property
    def output_bytes(self) -> int:
        """Exact size of the output but for manifest and card, whose numbers are measured."""
        return self.files.nbytes

    def record(self) -> RunRecord:
        """What the manifest says of the run."""
        activations = self.options.activations
        return RunRecord(
            format_version=FORMAT_VERSION,
            precalib=version("vllm-precalib"),
            recipe=self.options.label,
            recipes={plan.label: plan.recipe.to_dict() for plan in self.weight_plans.values()},
            overrides=[f"{pattern}={name}" for pattern, name in self.options.overrides],
            keep=list(self.options.keep),
            head=self.options.head,
            embeddings=self.options.embeddings,
            activations=activations.to_json() if activations else None,
            transform=self.options.transform,
            source=self.source.fingerprint(times=False),
        )

    def fingerprint(self, device: str) -> dict[str, Any]:
        """What must be equal for a later run to take up this one's work."""
        same = self.record().to_json()
        del same["source"]
        return {**same, "device": device, "source": self.source.fingerprint()}


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide about every tensor and lay out every file.

    Raises RecipeError or SourceError for anything that would fail later.
    """
    check_suitable(source)
    chosen = RecipeResolver(options)
    architectures = families.architectures_of(source.config, source.text_config)
    check_family(source, architectures, bool(options.head))
    flags = bool(options.head), bool(options.embeddings)
    choice = choose_weights(source, chosen.keep, *flags, architectures)
    wanted, others = choice.wanted, choice.unquantized
    for name, (file, entry) in wanted.items():
        check_type(source.root / file, name, entry)
    if not wanted:
        chosen.check_used(wanted, choice.unquantized_names)
        raise SourceError(
            f"{source.root}: no tensor looks like a linear weight of a decoder layer "
            "('….layers.N.….weight', 2-D); nothing to quantize"
        )
    origins = {}
    tied = heads.tied_to_embeddings(source, options, wanted) if options.embeddings else {}
    own = any(selection.HEAD.search(selection.module_of(name)) for name in wanted)
    if options.head and not tied and not own:
        head, origin, found = heads.tied_head(source, others)
        origins[head], wanted[head] = origin, found
    _keep_narrow(source, wanted, others, chosen)
    for head, origin in origins.items():
        if head not in wanted:
            raise SourceError(f"{source.root}: tensor '{origin}': {others[head]}; leave out --head")
    unquantized, experts = choice.by_tensor()
    tied = {head: other for head, other in tied.items() if f"{other}.weight" in wanted}
    if options.target_bits is not None:
        chosen.allocate({name: entry.shape for name, (_, entry) in wanted.items()}, source)
    weight_plans = {
        name: _weight_plan(source, name, origins.get(name, name), file, entry, chosen)
        for name, (file, entry) in wanted.items()
    }
    chosen.check_used(weight_plans, choice.unquantized_names)
    check_fused(weight_plans, unquantized)
    check_collisions(source, weight_plans)
    shards = {file: _lay_out(source, file, weight_plans, experts) for file in source.shards}
    config = checkpoint_config(options, weight_plans, unquantized, tied, experts)
    pairs = value_output.chosen_pairs(options.transform, source, weight_plans)
    files = OutputFiles(
        value_output.transform_files(pairs) | shards,
        {
            name: source.root / name
            for name in source.sidecar_files
            if not (options.card and name == CARD)
        },
        _metadata_files(source, shards, config),
    )
    return Plan(source, options, weight_plans, unquantized, files, pairs, tied, experts)


def checkpoint_config(
    options: Options,
    weight_plans: Mapping[str, WeightPlan],
    unquantized: Mapping[str, str],
    tied: Mapping[str, str],
    expert_tensors: Mapping[str, ExpertTensor],
) -> CheckpointConfig:
    """quantization_config of the output. Arguments as the fields of `Plan`."""
    layouts = {plan.label: plan.recipe.layout for plan in weight_plans.values()}
    modules = {plan.module: plan.label for plan in weight_plans.values()}
    label = options.label
    if options.head:
        label += f" --head {options.head}"
    if options.embeddings:
        label += f" --embeddings {options.embeddings}"
    if options.transform:
        label += f" --transform {options.transform}"
    linears = (
        selection.module_of(name)
        for name, reason in unquantized.items()
        if name.endswith(".weight") and reason != "not a linear weight"
    )
    return CheckpointConfig(label, layouts, modules, tuple(linears), tied, expert_tensors)


def _keep_narrow(
    source: Checkpoint,
    wanted: dict[str, tuple[str, Entry]],
    unquantized: dict[str, str],
    chosen: RecipeResolver,
) -> None:
    """Move weights with fewer inputs than a group of their recipe to the unquantized ones.

    Raises RecipeError if that leaves none.
    """
    narrow = {}
    for name, (_, entry) in wanted.items():
        _, recipe = chosen.recipe_for(selection.module_of(name))
        if reason := selection.too_narrow(entry.shape[1], recipe.layout.group_size):
            narrow[name] = reason
    modules = [selection.module_of(name) for name in wanted]
    experts = selection.expert_layers(modules).values()  # all of them are packed or none
    for siblings in (*selection.fused_siblings(modules), *experts):
        names = [f"{module}.weight" for module in siblings]
        if reason := next((narrow[name] for name in names if name in narrow), None):
            narrow |= {name: narrow.get(name, reason) for name in names}
    if len(narrow) == len(wanted):
        name, reason = next(iter(narrow.items()))
        file, entry = wanted[name]
        raise RecipeError(
            f"{source.root / file}: no weight can be quantized: tensor '{name}' and all others: "
            f"{reason}; use --group-size {entry.shape[1]} or smaller"
        )
    for name, reason in narrow.items():
        del wanted[name]
        unquantized[name] = reason


def _weight_plan(
    source: Checkpoint, name: str, origin: str, file: str, entry: Entry, chosen: RecipeResolver
) -> WeightPlan:
    path = source.root / file
    label, recipe = chosen.recipe_for(selection.module_of(name))
    rows, columns = entry.shape
    try:
        recipe.layout.tensors(rows, columns)
    except FormatError as error:
        raise SourceError(f"{path}: tensor '{name}': {error}; --keep it") from error
    return WeightPlan(name, origin, file, entry, label, recipe)


def _lay_out(
    source: Checkpoint,
    file: str,
    weight_plans: Mapping[str, WeightPlan],
    expert_tensors: Mapping[str, ExpertTensor],
) -> FileLayout:
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, entry in source.shards[file].items():
        if name in weight_plans:
            tensors |= weight_plans[name].outputs()
        elif name in expert_tensors:
            for part in expert_tensors[name].parts():
                tensors |= weight_plans[f"{part.module}.weight"].outputs()
        else:
            tensors[name] = (entry.dtype, entry.shape, entry.nbytes)
    for plan in weight_plans.values():
        if plan.file == file and plan.name != plan.origin:
            tensors |= plan.outputs()
    return lay_out(tensors, source.metadata[file])


def _metadata_files(
    source: Checkpoint,
    shards: Mapping[str, FileLayout],
    quantization: CheckpointConfig,
) -> dict[str, bytes]:
    """The generated files; config.json comes last."""
    files: dict[str, bytes] = {}
    if source.index is not None:
        files[INDEX] = json_bytes(index_of(shards, source.index))
    config = dict(source.config)
    config["quantization_config"] = quantization.to_dict()
    head = any(map(selection.HEAD.search, quantization.modules))
    embeddings = any(map(selection.EMBEDDINGS.search, quantization.modules))
    if head or (embeddings and not quantization.tied):
        heads.untie(config)
    files[CONFIG] = json_bytes(config)
    return files
