"""Rules of salience other than the recipes' own: any score of a weight, per group or per tensor."""

from collections.abc import Callable

import torch
from torch import Tensor

from offline_quantize.method.codes import Objective
from offline_quantize.method.encode import PreparedRows, encode_groups, prepare_matrix
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.salience import SalientWeights, largest_positions
from offline_quantize.method.scales import row_scales
from precalib_kernels.format.layout import Layout

# From a weight [N, K] and its column scale [1, K] to scores [N, K] above zero: the largest are
# salient.
Score = Callable[[Tensor, Tensor], Tensor]


def magnitude(weight: Tensor, column_scale: Tensor) -> Tensor:
    """|w| with the column scale taken off, as the recipes have it."""
    return (weight / column_scale).abs()


def original_magnitude(weight: Tensor, column_scale: Tensor) -> Tensor:  # noqa: ARG001
    """|w| of the weight as it is."""
    return weight.abs()


def weighted_magnitude(importance: Tensor) -> Score:
    """|w|·√importance: w² times what a squared error there costs; importance [K] or [N, K]."""

    def score(weight: Tensor, column_scale: Tensor) -> Tensor:  # noqa: ARG001
        return weight.abs() * importance.sqrt()

    return score


def quantize_by_score(
    weight: Tensor,
    recipe: Recipe,
    score: Score,
    per_tensor: bool = False,
    inputs: InputStatistics | None = None,
    error_cost: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Dequantized weight and stored bits where the largest scores are salient.

    weight:     float32 [N, K].
    per_tensor: whether all scores above one threshold are salient, which a share `recipe.alpha` of
                the tensor exceeds; never more than the layout has places for in a group. Else the
                largest of each group fill the places.
    inputs:     what the column scale takes into account.
    error_cost: what a squared error costs in each column, [K], for the search through the trellis.
    """
    layout, columns = recipe.layout, weight.shape[1]
    matrix = prepare_matrix(weight, recipe, "weight", inputs)
    scale = torch.ones(1, columns) if matrix.column_scale is None else matrix.column_scale
    scores = score(weight, scale)
    if per_tensor:
        threshold = scores.flatten().kthvalue(round((1 - recipe.alpha) * scores.numel())).values
        scores = torch.where(scores > threshold, scores, 0)
    positions = largest_positions(to_groups(scores, layout), layout.salient_count)
    salient = SalientWeights.at(positions, layout.group_size)
    target = to_groups(weight / scale, layout)
    padding = target[0].numel() - columns
    rows = PreparedRows(target, salient, row_scales(target, salient, recipe), padding)
    objective = Objective()
    if error_cost is not None:
        importance = error_cost * scale.square()  # rounded as in the encoder
        objective = Objective(to_groups(importance / importance.mean(), layout)[0])
    values = encode_groups(rows, recipe, objective).codes.values.flatten(1)[:, :columns]
    return values * scale, 8 * layout.stored_bytes(*weight.shape)


def to_groups(weight: Tensor, layout: Layout) -> Tensor:
    """[N, K] to [N, G, group_size], the last group filled up with zeros."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % layout.group_size))
    return padded.view(len(weight), -1, layout.group_size)
