"""What `precalib quantize --transform value-output` writes beside packed weights.

The matrices come first and are on disk before a weight that depends on them is made, so both
weights of a pair have the same ones, also if the run was broken off between the two.
"""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from offline_quantize.checkpoint.atomic_files import TRANSFORMS
from offline_quantize.checkpoint.safetensors_file import TensorLocation
from offline_quantize.checkpoint.transforms import Original, Transforms
from offline_quantize.checkpoint.write_job import WriteJob
from offline_quantize.method.encode import non_finite
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.value_output_learning import MatrixKind, learn
from offline_quantize.method.value_output_proxies import ExpectedError
from offline_quantize.planning.plan import Plan
from offline_quantize.planning.value_output import ValueOutputPair


def transform_jobs(plan: Plan, transforms: Transforms, device: str) -> Iterator[WriteJob]:
    """The jobs of the matrices, and of the biases that they change."""
    for pair in plan.pairs:
        learning = functools.partial(_learn, *_sides(plan, pair), pair, device)
        yield WriteJob(pair.matrices, TRANSFORMS, [pair.matrices], 0, learning)
        if pair.bias is not None:
            bias = plan.source.locations[pair.bias]
            make = functools.partial(_bias, Original(bias, transforms))
            yield WriteJob(pair.bias, bias.path.name, [pair.bias], bias.entry.nbytes, make)


def _sides(plan: Plan, pair: ValueOutputPair) -> tuple[list[TensorLocation], list[Recipe]]:
    """Where the two weights of a pair are, and their recipes."""
    names = (pair.value, pair.output)
    locations = [plan.source.locations[name] for name in names]
    return locations, [plan.weight_plans[name].recipe for name in names]


def _learn(
    locations: list[TensorLocation], recipes: list[Recipe], pair: ValueOutputPair, device: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    value, output = (_read(location, device) for location in locations)
    scaled = any(recipe.layout.column_scale for recipe in recipes)
    # beside a column scale an invertible matrix loses (benchmarks/results/cafeq.md)
    kind: MatrixKind = "orthogonal" if scaled else "invertible"
    learned = learn(value, output, pair.heads, ExpectedError(recipes[0], recipes[1]), kind)
    report = {"expected_error_before": learned.before, "expected_error_after": learned.after}
    return {pair.matrices: learned.matrices.cpu()}, report


def _read(location: TensorLocation, device: str) -> Tensor:
    weight = location.read().to(device)
    if not bool(weight.isfinite().all()):
        raise non_finite(weight, f"{location.path}: tensor '{location.name}'")
    return weight


def _bias(bias: Original) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {bias.location.name: bias.read()}, {}
