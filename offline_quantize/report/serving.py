"""Which backend would serve each layout of a packed checkpoint on this machine."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from offline_quantize.checkpoint.packed import PackedCheckpoint
from offline_quantize.planning.selection import EXPERT_INDEX
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.registry import BackendRegistry
from precalib_kernels.errors import ServingError

DTYPE = torch.bfloat16  # of the activations


@dataclasses.dataclass(frozen=True)
class Serving:
    """Weights of one layout that one backend serves, for the same reasons.

    recipe:  what the checkpoint calls the layout.
    weights: how many of them there are.
    backend: name of the backend; None if no backend can run.
    reasons: for every other backend by name, best first, why it was not chosen.
    """

    recipe: str
    weights: int
    backend: str | None
    reasons: Mapping[str, str]


def this_device() -> str:
    """What torch computes on here: "cpu" or "cuda"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def served_by(
    packed: PackedCheckpoint, registry: BackendRegistry, device: str
) -> Sequence[Serving]:
    """The choice of `registry` for every packed weight, in the order of the files.

    Experts of one layer count as one layer of that many matrices; other weights are not fused.
    """
    found: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], int] = {}
    for recipe, spec, weights in _specs(packed, device):
        try:
            choice = registry.choose(spec)
            backend, reasons = choice.backend.name, dict(choice.reasons)
        except ServingError:
            backend = None
            reasons = {name: why for name, why in registry.reasons(spec).items() if why}
        key = recipe, backend, tuple(reasons.items())
        found[key] = found.get(key, 0) + weights
    return [
        Serving(recipe, weights, backend, dict(reasons))
        for (recipe, backend, reasons), weights in found.items()
    ]


def _specs(packed: PackedCheckpoint, device: str) -> Iterator[tuple[str, LinearSpec, int]]:
    """Recipe and layer of all packed weights, each different one once, and how many there are."""
    layers = collections.Counter(  # experts of one layer are under one name
        (EXPERT_INDEX.sub(".experts.*.", module), recipe, packed.shape(module))
        for module, recipe in packed.config.modules.items()
    )
    counts: collections.Counter[tuple[str, tuple[int, int], int]] = collections.Counter()
    for (module, recipe, shape), weights in layers.items():
        experts = weights if ".experts." in module else 0
        counts[recipe, shape, experts] += weights
    for (recipe, (rows, inputs), experts), weights in counts.items():
        layout = packed.config.layouts[recipe]
        yield recipe, LinearSpec(layout, inputs, (rows,), DTYPE, device, experts), weights
