"""`--target-bits`: which layout each weight gets so that all together have a given size.

Nothing is measured on the model: a weight's expected loss is its relative error, which its layout
alone sets once the column scale is taken off, times a sensitivity that its name and place tell.
All weights get the largest layout that fits, and what is left goes where it lowers the sum of
losses most per byte. Weights that vLLM computes as one layer,
and all experts of one, get the same layout.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from offline_quantize.checkpoint.source import whole_number
from offline_quantize.method import recipes
from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import selection
from precalib_kernels.errors import RecipeError

Shape = tuple[int, int]


class BitOption(NamedTuple):
    """A recipe, with the name that makes it again, and its relative squared error on a normal."""

    label: str
    recipe: Recipe
    error: float

    def nbytes(self, shapes: list[Shape]) -> int:
        """Stored size of weights of these shapes."""
        return sum(self.recipe.layout.stored_bytes(*shape) for shape in shapes)


def _option(name: str, alpha: float, error: float, salient_bits: int | None = None) -> BitOption:
    recipe = recipes.find(name)
    if alpha == recipe.alpha and salient_bits is None:
        return BitOption(name, recipe, error)
    label = f"{name} --alpha {alpha}"
    if salient_bits is not None:
        label += f" --salient-bits {salient_bits}"
    adjusted = recipes.adjust(recipe, alpha=alpha, salient_bits=salient_bits)
    return BitOption(label, adjusted, error)


# By size. More salient weights, or groups of 64, buy less per bit than the next base code
# (docs/method.md).
OPTIONS = (
    _option("balanced-2", 1 / 128, 0.0786, salient_bits=8),
    _option("balanced-2", 2 / 128, 0.0720, salient_bits=7),
    _option("balanced-2", 3 / 128, 0.0670),
    _option("balanced-2", 4 / 128, 0.0631),
    _option("balanced-3", 1 / 128, 0.0204),
    _option("balanced-3", 2 / 128, 0.0183),
    _option("balanced-3", 4 / 128, 0.0158),
    _option("balanced-4", 1 / 128, 0.00518),
    _option("balanced-4", 2 / 128, 0.00463),
    _option("balanced-5", 1 / 128, 0.00133),
    _option("balanced-5", 2 / 128, 0.00118),
)

# Few and round: other values help one of two models and hurt the other (docs/method.md).
WRITES_BACK = re.compile(r"\.(?:o_proj|out_proj|down_proj|w2|wo|c_proj|fc2|dense_4h_to_h)$")
KEY_OR_VALUE = re.compile(r"\.(?:k_proj|v_proj)$")
FUSED_QKV = re.compile(r"\.(?:qkv_proj|query_key_value|wqkv|c_attn)$", re.IGNORECASE)
# Of the query heads that a key or value head serves, without known inputs and with them.
SHARING_EXPONENTS = (1.0, 0.5)
WRITE_BACK_FACTOR = 1.5  # their error enters the residual stream as it is
FIRST_LAYERS, FIRST_FACTOR = 2, 2.0
LAST_FACTOR = 3.0


def allocate(
    weights: Mapping[str, Shape],
    target_bits: float,
    config: Mapping[str, Any],
    fixed: tuple[int, int] = (0, 0),
    inputs_known: bool = False,
) -> dict[str, tuple[str, Recipe]]:
    """Label and recipe of every module, effective bits of all together at most `target_bits`.

    weights: shape of each module's weight.
    config:  of the language model: its numbers of layers and of attention heads are used.
    fixed:   number and stored bytes of weights that count towards the target but are decided.
    inputs_known: whether weights will be quantized for the inputs of their layers.

    Raises RecipeError for a target that no allocation meets, or that all but the largest exceed.
    """
    units = _units(weights)
    shapes = {unit: [weights[module] for module in units[unit]] for unit in units}
    count = fixed[0] + sum(rows * columns for rows, columns in weights.values())
    allowed = int(target_bits * count / 8) - fixed[1]
    every = [shape for unit in units for shape in shapes[unit]]
    smallest, largest = (OPTIONS[i].nbytes(every) for i in (0, -1))
    if not smallest <= allowed <= largest:
        low, high = (8 * (size + fixed[1]) / count for size in (smallest, largest))
        raise RecipeError(
            f"--target-bits {target_bits:g} cannot be met: these weights take between "
            f"{math.ceil(1000 * low) / 1000:.3f} and {math.floor(1000 * high) / 1000:.3f} "
            "effective bits"
        )
    options = _options_from(every, allowed)
    depth = _depth(weights, config)
    expected_loss = {
        unit: sum(
            rows * columns * sensitivity(module, depth, config, inputs_known)
            for module, (rows, columns) in zip(units[unit], shapes[unit], strict=True)
        )
        for unit in units
    }
    chosen = _greedy(options, shapes, expected_loss, allowed)
    return {
        module: (options[chosen[unit]].label, options[chosen[unit]].recipe)
        for unit in units
        for module in units[unit]
    }


def sensitivity(
    module: str, depth: int, config: Mapping[str, Any], inputs_known: bool = False
) -> float:
    """KL that a relative error of this weight causes, per weight, against that of a query's.

    A key or value head that serves n query heads counts n times, or √n times if inputs are known.
    """
    heads = whole_number(config, "num_attention_heads")
    served = whole_number(config, "num_key_value_heads") or heads
    queries = heads / served if heads and served else 1.0  # of each key or value head
    key_or_value = queries ** SHARING_EXPONENTS[inputs_known]
    factor = 1.0
    if KEY_OR_VALUE.search(module):
        factor = key_or_value
    elif FUSED_QKV.search(module):
        factor = (queries + 2 * key_or_value) / (queries + 2)  # mean over rows of q, k and v
    elif WRITES_BACK.search(module):
        factor = WRITE_BACK_FACTOR
    layer = _layer(module)
    if layer == depth - 1:
        return factor * LAST_FACTOR
    return factor * FIRST_FACTOR if layer < FIRST_LAYERS else factor


def _greedy(
    options: tuple[BitOption, ...],
    shapes: Mapping[str, list[Shape]],
    expected_loss: Mapping[str, float],
    allowed: int,
) -> dict[str, int]:
    """Option of each unit: from the first, always the step that lowers the loss most per byte."""
    sizes = {unit: [option.nbytes(shapes[unit]) for option in options] for unit in shapes}
    chosen = dict.fromkeys(shapes, 0)
    spare = allowed - sum(size[0] for size in sizes.values())

    def best_step(unit: str) -> tuple[float, int, int]:
        now, size = chosen[unit], sizes[unit]
        steps = [
            (
                expected_loss[unit]
                * (options[now].error - options[up].error)
                / (size[up] - size[now]),
                -up,
            )
            for up in range(now + 1, len(options))
            if size[up] - size[now] <= spare
        ]
        gain, up = max(steps, default=(0.0, 0))
        return gain, -up, size[-up] - size[now]

    while True:
        steps = {unit: best_step(unit) for unit in shapes}
        unit = max(steps, key=lambda unit: steps[unit][0])  # the first of equals
        gain, up, cost = steps[unit]
        if not gain:
            return chosen
        chosen[unit], spare = up, spare - cost


def _options_from(every: list[Shape], allowed: int) -> tuple[BitOption, ...]:
    """The largest option that all weights can have, and larger ones up to the next wider base code.

    So no weight gets less than in a uniform model of that size, whatever its sensitivity.
    """
    sizes = [option.nbytes(every) for option in OPTIONS]
    least = max(i for i, size in enumerate(sizes) if size <= allowed)
    widest = OPTIONS[least].recipe.layout.bits + 1
    return tuple(o for o in OPTIONS[least:] if o.recipe.layout.bits <= widest)


def _units(weights: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Modules that share a layout, by a name for them."""
    unit_of = {module: selection.EXPERT_INDEX.sub(".experts.", module) for module in weights}
    for siblings in selection.fused_siblings(set(unit_of.values())):
        for module, unit in unit_of.items():
            if unit in siblings:
                unit_of[module] = siblings[0]
    units: dict[str, list[str]] = {}
    for module, unit in unit_of.items():
        units.setdefault(unit, []).append(module)
    return units


def _depth(weights: Mapping[str, Shape], config: Mapping[str, Any]) -> int:
    depth = selection.decoder_depth(config)
    return 1 + max(_layer(module) for module in weights) if depth is None else depth


def _layer(module: str) -> int:
    match = selection.LAYER.search(f"{module}.")
    return int(match[1]) if match else -1
