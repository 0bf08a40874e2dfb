"""The plan of a run: what happens to every tensor and what every output file will look like.

It is made from headers alone, so all that can be wrong is found before a byte is written, and the
sizes it tells are exact.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.safetensors_file import NAMES, Entry, FileLayout, lay_out
from offline_quantize.checkpoint.source import CONFIG, INDEX, Checkpoint, refuse_unsuitable
from offline_quantize.method import recipes
from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import selection
from offline_quantize.planning.bit_allocation import allocate
from precalib_kernels.errors import FormatError, RecipeError, SourceError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import COLUMN_UNIT, FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for.

    recipe:      name of the main recipe, None for the default; `changes` adjust it.
    overrides:   (pattern, recipe name) pairs, the first that matches a module wins.
    keep:        patterns of modules to leave as they are.
    target_bits: true bits that all quantized weights together may take, in place of a recipe.
    head:        name of the recipe for the output head, None to leave it as it is.
    """

    recipe: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Sequence[tuple[str, str]] = ()
    keep: Sequence[str] = ()
    target_bits: float | None = None
    head: str | None = None

    @property
    def label(self) -> str:
        """The main recipe with its adjustments, as one writes it on the command line."""
        if self.target_bits is not None:
            return f"--target-bits {self.target_bits:g}"
        return " ".join([self.recipe or recipes.DEFAULT, *self.flags])

    @property
    def flags(self) -> list[str]:
        """The adjustments alone."""
        return [f"{_flag(name)} {v}" for name, v in self.changes.items() if v is not None]


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

    packings: weights to quantize, by name.
    kept:     why each other tensor stays as it is, by name.
    shards:   layout of every output weight file.
    small:    contents of the other generated files, in the order they are to be written.
    """

    source: Checkpoint
    options: Options
    packings: Mapping[str, WeightPlan]
    kept: Mapping[str, str]
    shards: Mapping[str, FileLayout]
    small: Mapping[str, bytes]

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(packing.entry.weights for packing in self.packings.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that replace a weight."""
        return sum(
            packing.recipe.layout.stored_bytes(*packing.entry.shape)
            for packing in self.packings.values()
        )

    @property
    def kept_linears(self) -> list[str]:
        """Modules of 2-D weights inside the decoder layers that stay as they are."""
        return [
            selection.module_of(name)
            for name in self.kept
            if name.endswith(".weight") and self.kept[name] != "not a linear weight"
        ]

    @property
    def output_bytes(self) -> int:
        """Exact size of the output but for its manifest, whose numbers are measured."""
        carried = sum((self.source.root / name).stat().st_size for name in self.source.others)
        written = sum(layout.size for layout in self.shards.values())
        return written + carried + sum(len(data) for data in self.small.values())

    def fingerprint(self, device: str) -> dict[str, Any]:
        """What must be equal for a later run to take up this one's work."""
        used = {packing.label: packing.recipe.to_dict() for packing in self.packings.values()}
        return {
            "format_version": FORMAT_VERSION,
            "precalib": version("vllm-precalib"),
            "recipe": self.options.label,
            "recipes": used,
            "overrides": [f"{pattern}={name}" for pattern, name in self.options.overrides],
            "keep": list(self.options.keep),
            "head": self.options.head,
            "device": device,
            "source": self.source.fingerprint(),
        }


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide about every tensor and lay out every file.

    Raises RecipeError or SourceError for anything that would fail later.
    """
    refuse_unsuitable(source)
    chosen = _RecipeResolver(options)
    wanted: dict[str, tuple[str, Entry]] = {}
    kept: dict[str, str] = {}
    depth = selection.decoder_depth(source.text_config, source.config)
    for file, entries in source.shards.items():
        for name, entry in entries.items():
            reason = selection.classify(
                name, entry.shape, entry.dtype, depth, chosen.keep, bool(options.head)
            )
            if reason:
                kept[name] = reason
            else:
                _refuse_type(source.root / file, name, entry)
                wanted[name] = file, entry
    if not wanted:
        chosen.refuse_unused(wanted, kept)
        raise SourceError(
            f"{source.root}: no tensor looks like a linear weight of a decoder layer "
            "('….layers.N.….weight', 2-D); nothing to quantize"
        )
    origins = {}
    if options.head and not any(selection.HEAD.search(selection.module_of(n)) for n in wanted):
        origins[selection.TIED_HEAD] = selection.TIED_EMBEDDING
        wanted[selection.TIED_HEAD] = _tied_head(source, kept)
    if options.target_bits is not None:
        chosen.allocate({name: entry.shape for name, (_, entry) in wanted.items()}, source)
    packings = {
        name: _packing(source, name, origins.get(name, name), file, entry, chosen)
        for name, (file, entry) in wanted.items()
    }
    chosen.refuse_unused(packings, kept)
    _refuse_mixed_parts(packings, kept)
    _refuse_collisions(source, packings)
    shards = {file: _lay_out(source, file, packings) for file in source.shards}
    plan = Plan(source, options, packings, kept, shards, {})
    return dataclasses.replace(plan, small=_small_files(plan))


def checkpoint_config(plan: Plan) -> CheckpointConfig:
    """quantization_config of the output."""
    layouts = {packing.label: packing.recipe.layout for packing in plan.packings.values()}
    modules = {packing.module: packing.label for packing in plan.packings.values()}
    label = plan.options.label
    if plan.options.head:
        label += f" --head {plan.options.head}"
    return CheckpointConfig(label, layouts, modules, tuple(plan.kept_linears))


class _RecipeResolver:
    """The recipe of each module under the user's options."""

    def __init__(self, options: Options) -> None:
        for name, value in (*options.changes.items(), ("target_bits", options.target_bits)):
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{_flag(name)} {value}: give a finite number")
        self.target_bits = options.target_bits
        if self.target_bits is not None and (options.recipe or options.flags):
            given = f"--recipe {options.recipe}" if options.recipe else options.flags[0]
            raise RecipeError(
                f"--target-bits {self.target_bits:g} chooses the recipes itself; leave out {given}"
            )
        main = recipes.find(options.recipe or recipes.DEFAULT)
        self.main = options.label, recipes.adjust(main, **options.changes)
        self.allocated: Mapping[str, tuple[str, Recipe]] = {}
        self.keep = [_pattern(text, "--keep") for text in options.keep]
        self.overrides = [
            (_pattern(text, "--override"), name, recipes.find(name))
            for text, name in options.overrides
        ]
        self.head = recipes.for_head(options.head) if options.head else None
        self.used: set[str] = set()

    def recipe_for(self, module: str) -> tuple[str, Recipe]:
        for pattern, name, recipe in self.overrides:
            if pattern.search(module):
                self.used.add(pattern.pattern)
                return name, recipe
        if self.head and selection.HEAD.search(module):
            return self.head
        return self.allocated.get(module, self.main)

    def allocate(self, shapes: Mapping[str, tuple[int, ...]], source: Checkpoint) -> None:
        """Give each weight, by name, that no override takes a recipe; all meet the target."""
        assert self.target_bits is not None
        free: dict[str, tuple[int, int]] = {}
        number = nbytes = 0
        for name, (rows, columns) in shapes.items():
            label, recipe = self.recipe_for(module := selection.module_of(name))
            if label == self.main[0]:
                free[module] = rows, columns
            else:
                number += rows * columns
                nbytes += recipe.layout.stored_bytes(rows, columns)
        if free:
            fixed = number, nbytes
            self.allocated = allocate(free, self.target_bits, source.text_config, fixed)

    def refuse_unused(self, packings: Iterable[str], kept: Iterable[str]) -> None:
        """A pattern that matches nothing is a typing error, found before hours of work."""
        for pattern, _, _ in self.overrides:
            if pattern.pattern not in self.used:
                raise RecipeError(
                    f"--override {pattern.pattern!r} matches no module that is quantized and that "
                    "no earlier --override takes; compare it with the names that --dry-run shows"
                )
        modules = [selection.module_of(name) for name in (*packings, *kept)]
        for pattern in self.keep:
            if not any(pattern.search(module) for module in modules):
                raise RecipeError(
                    f"--keep {pattern.pattern!r} matches no module; "
                    "compare it with the tensor names of the checkpoint"
                )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pattern(text: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"{option} {text!r} is not a regular expression ({error}); "
            "quote it for the shell, and write \\. for a dot"
        ) from error


def _refuse_type(path: Path, name: str, entry: Entry, remedy: str = "use --keep") -> None:
    """Raise SourceError for a weight of a type that cannot be quantized."""
    if entry.dtype not in selection.FLOAT_TYPES:
        raise SourceError(
            f"{path}: tensor '{name}' has type {entry.dtype}; only bfloat16, float16 and float32 "
            f"weights can be quantized, so start from the original checkpoint or {remedy}"
        )


def _tied_head(source: Checkpoint, kept: Mapping[str, str]) -> tuple[str, Entry]:
    """File and entry of the embeddings, of which the head is a copy; SourceError if it is not."""
    root, name = source.root, selection.TIED_EMBEDDING
    for other, reason in kept.items():
        if reason == "output head" or selection.HEAD.search(selection.module_of(other)):
            raise SourceError(f"{root}: the head '{other}' is kept ({reason}); leave out --head")
    found = next((f for f, entries in source.shards.items() if name in entries), None)
    tied = source.config.get("tie_word_embeddings", True)
    if found is None or not tied or source.text_config is not source.config:
        raise SourceError(
            f"{root}: holds no output head, and no '{name}' of a plain language model that could "
            "stand for it; leave out --head"
        )
    entry = source.shards[found][name]
    _refuse_type(root / found, name, entry, "leave out --head")
    if entry.shape[1] % COLUMN_UNIT:
        raise SourceError(
            f"{root / found}: tensor '{name}' has input size {entry.shape[1]}, which is not a "
            f"multiple of {COLUMN_UNIT}; leave out --head"
        )
    return found, entry


def _packing(
    source: Checkpoint, name: str, origin: str, file: str, entry: Entry, chosen: _RecipeResolver
) -> WeightPlan:
    path = source.root / file
    label, recipe = chosen.recipe_for(selection.module_of(name))
    rows, columns = entry.shape
    if recipe.layout.group_size > columns:
        raise RecipeError(
            f"{path}: group size {recipe.layout.group_size} does not fit tensor '{name}' with "
            f"{columns} inputs; use --group-size {columns} or smaller, or --keep it"
        )
    try:
        recipe.layout.tensors(rows, columns)
    except FormatError as error:
        raise SourceError(f"{path}: tensor '{name}': {error}; --keep it") from error
    return WeightPlan(name, origin, file, entry, label, recipe)


def _refuse_mixed_parts(packings: Mapping[str, WeightPlan], kept: Mapping[str, str]) -> None:
    layouts = {p.module: p.recipe.layout for p in packings.values()}
    labels = {p.module: p.label for p in packings.values()}
    everything = [*layouts, *(selection.module_of(n) for n in kept if n.endswith(".weight"))]
    for parts in selection.fused_siblings(everything):
        if len({layouts.get(part) for part in parts}) > 1:
            state = ", ".join(f"{part} ({labels.get(part, 'kept')})" for part in parts)
            raise RecipeError(
                "vLLM computes these as one layer, so they need one recipe or must all be kept; "
                f"widen or narrow --override and --keep: {state}"
            )


def _lay_out(source: Checkpoint, file: str, packings: Mapping[str, WeightPlan]) -> FileLayout:
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, entry in source.shards[file].items():
        if name in packings:
            tensors |= packings[name].outputs()
        else:
            tensors[name] = (entry.dtype, entry.shape, entry.nbytes)
    for packing in packings.values():
        if packing.file == file and packing.name != packing.origin:
            tensors |= packing.outputs()
    return lay_out(tensors, source.metadata[file])


def _refuse_collisions(source: Checkpoint, packings: Mapping[str, WeightPlan]) -> None:
    taken = {name for entries in source.shards.values() for name in entries}
    for packing in packings.values():
        for name in packing.outputs():
            if name in taken:
                raise SourceError(
                    f"{source.root / packing.file}: packing '{packing.name}' would make a second "
                    f"tensor '{name}'; leave it with --keep '{re.escape(packing.module)}$'"
                )


def _small_files(plan: Plan) -> dict[str, bytes]:
    small: dict[str, bytes] = {}
    if plan.source.index is not None:
        small[INDEX] = json_bytes(index_of(plan.shards, plan.source.index))
    config = dict(plan.source.config)
    config["quantization_config"] = checkpoint_config(plan).to_dict()
    if plan.options.head:
        config["tie_word_embeddings"] = False  # a packed head has tensors of its own
    small[CONFIG] = json_bytes(config)
    return small


def index_of(shards: Mapping[str, FileLayout], source: Mapping[str, Any]) -> dict[str, Any]:
    """The index file of the given shards; other metadata of the source's index is kept."""
    weight_map = {name: file for file, layout in shards.items() for name in layout.entries}
    size = sum(entry.nbytes for layout in shards.values() for entry in layout.entries.values())
    metadata = source.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    return {
        "metadata": {**kept, "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
