"""Which share of salient weights suits a weight best, and what of its shape tells so."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from salience_rules import magnitude, quantize_by_score, to_groups
from torch import Tensor

from offline_quantize import list_recipes
from offline_quantize.method.encode import prepare_matrix
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import Recipe, adjust

COUNTS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 19)  # of 128
REFERENCE = 4  # of 128: what balanced-3 has
EVERY = 3  # layers from one that is looked at to the next
LAYER = re.compile(r"\.layers\.(\d+)\.")
LARGE = 4096, 4096  # a shape whose size is that of long rows


def best_shares(
    weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]
) -> Iterator[dict[str, Any]]:
    """Facts about the weights of every third layer, a dictionary each."""
    for name, weight in weights.items():
        layer = LAYER.search(name)
        if layer and int(layer[1]) % EVERY == 0:
            yield facts(name, weight.float(), inputs[name].mean_square)


def facts(name: str, weight: Tensor, mean_square: Tensor) -> dict[str, Any]:
    """Kurtosis, errors by number of salient weights, and the numbers that pay best.

    errors, weighted_errors: relative squared errors of the weight and of its outputs with
                             X·Xᵀ = diag(E[x²]), for COUNTS.
    best, weighted_best:     which of COUNTS costs the fewest bits in all; see `total_bits`.
    gain, weighted_gain:     bits saved by it beside the REFERENCE.
    """
    recipe = list_recipes()["balanced-3"]
    found: dict[str, Any] = {
        "weight": name,
        "kind": name.removesuffix(".weight").rpartition(".")[2],
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "kurtosis": kurtosis(weight, recipe),
        "counts": COUNTS,
    }
    more_bits = adjust(recipe, bits=4)
    for prefix, cost in (("", None), ("weighted_", mean_square)):
        errors = [error(weight, with_count(recipe, count), cost) for count in COUNTS]
        bit = errors[COUNTS.index(REFERENCE)] / error(weight, more_bits, cost)
        totals = [
            total_bits(with_count(recipe, count), of_count, bit)
            for count, of_count in zip(COUNTS, errors, strict=True)
        ]
        best = min(range(len(COUNTS)), key=totals.__getitem__)
        found |= {
            f"{prefix}errors": errors,
            f"{prefix}best": COUNTS[best],
            f"{prefix}gain": totals[COUNTS.index(REFERENCE)] - totals[best],
        }
    return found


def total_bits(recipe: Recipe, of_recipe: float, bit: float) -> float:
    """Effective bits, and the base bits that an error stands for.

    bit: by what one more base bit divides the weight's error. Two recipes with an equal total lie
         on one line from the first to what a wider base code makes of it.
    """
    return recipe.layout.bits_per_weight(*LARGE) + math.log(of_recipe, bit)


def error(weight: Tensor, recipe: Recipe, cost: Tensor | None) -> float:
    """Σ cost·(w − ŵ)² / Σ cost·w², cost [K] being 1 if None."""
    values, _ = quantize_by_score(weight, recipe, magnitude)
    lost, whole = (weight - values).square(), weight.square()
    if cost is not None:
        lost, whole = lost * cost, whole * cost
    return float(lost.sum() / whole.sum())


def with_count(recipe: Recipe, count: int) -> Recipe:
    """The recipe with so many salient weights of 128."""
    return adjust(recipe, alpha=count / 128)


def kurtosis(weight: Tensor, recipe: Recipe) -> float:
    """Excess kurtosis of weights over the root mean square of their group; 0 for a normal."""
    scale = prepare_matrix(weight, recipe, "weight").column_scale
    assert scale is not None
    size = recipe.layout.group_size
    whole = weight.shape[1] // size * size
    groups = to_groups((weight / scale)[:, :whole], recipe.layout)
    groups = groups / groups.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return float(groups.pow(4).mean()) - 3
