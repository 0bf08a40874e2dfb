"""One weight matrix to packed tensors. The stages, in the order in which a weight goes through:

    column scale    sinkhorn.py             one factor per input column      of the whole matrix
    salient choice  salience.py             which weights get wider codes    λ', then row by row
    scales          scales.py               size of a step, zero point       of rows, of groups
    codes           codes.py, trellis.py    the number stored per weight     of groups
                    feedback.py             or, where the Hessian is known   of rows
    pack            pack.py                 the tensors of the file format   of rows
    statistics      weight_statistics.py    what was lost

`prepare_matrix` and `prepare_rows` settle what groups share; `encode_groups` then codes any
consecutive groups of the rows, one or all. With the Hessian of the inputs `encode_rows` takes its
place: errors of earlier columns move the target of later ones. Rows are independent, so a matrix is
taken in blocks of rows, on a CPU such that fit its caches. Everything is computed where
the weight lies.
"""

import dataclasses
import math

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import in_groups, power_of_two
from offline_quantize.method.codes import SQUARED_ERROR, Codes, Objective, find_codes
from offline_quantize.method.feedback import find_codes_with_feedback
from offline_quantize.method.feedback_factor import FeedbackFactor, feedback_factor
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.pack import pack_rows
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.salience import SalientWeights, choose_salient, penalty
from offline_quantize.method.scales import GroupScales, RowScales, group_scales, row_scales
from offline_quantize.method.sinkhorn import column_scale, input_sizes
from offline_quantize.method.weight_statistics import Statistics
from precalib_kernels.errors import SourceError, UnfitError
from precalib_kernels.format.layout import Layout

BLOCK_WEIGHTS = 1 << 19  # 2 MiB of float32
GPU_BLOCK_WEIGHTS = 1 << 24  # a search has a thread per group, and every stage starts many kernels
SHRINKS = (1.0, 2 ** (-1 / 16), 2 ** (-2 / 16))  # of group scales; that of least loss is kept
FEEDBACK_ROWS = 128  # at least so many at once: all of them read the factor of the Hessian


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed tensors of one weight, their layout, and what was measured while packing them.

    tensors: as `Layout.tensors` names them, on the device of the weight.
    """

    tensors: dict[str, Tensor]
    statistics: Statistics
    layout: Layout


@dataclasses.dataclass(frozen=True)
class PreparedMatrix:
    """What all rows of a weight [N, K] share.

    column_scale: float32 [1, K] on the float16 grid, or None for a layout without one.
    penalty:      λ' of the weight, 0 for the rule "group".
    largest:      largest magnitude of the weight.
    factor:       of the Hessian, None where it is unknown.
    objective:    what the codes of whole rows are to make small, where there is no factor.
    """

    column_scale: Tensor | None
    penalty: float
    largest: float
    factor: FeedbackFactor | None = None
    objective: Objective = SQUARED_ERROR


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Rows of a weight, ready to be coded group by group.

    target:  float32 [R, G, group_size], what codes are to stand for: the weights without their
             column scale, zeros in the padding of a ragged last group.
    salient: which of them are salient.
    scales:  what all groups of a row share.
    padding: number of columns of the last group that are padding.
    """

    target: Tensor
    salient: SalientWeights
    scales: RowScales
    padding: int

    def groups(self, first: int, last: int) -> "PreparedRows":
        """The same rows with groups first … last - 1 only."""
        count, size = self.target.shape[1:]
        return dataclasses.replace(
            self,
            target=self.target[:, first:last].contiguous(),
            salient=SalientWeights.at(self.salient.positions[:, first:last], size),
            padding=self.padding if last == count else 0,
        )


@dataclasses.dataclass(frozen=True)
class EncodedGroups:
    """Scales and codes of groups; `codes.values` is what they stand for."""

    scales: GroupScales
    codes: Codes


def encode_unchecked(
    weight: Tensor,
    recipe: Recipe,
    where: str,
    inputs: InputStatistics | None = None,
    histograms: bool = True,
) -> Encoded:
    """Quantize and pack one weight, whatever the error; else as `encode`."""
    layout, (rows, columns) = recipe.layout, weight.shape
    matrix = prepare_matrix(weight, recipe, where, inputs)
    tensors = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
        for name, spec in layout.tensors(rows, columns).items()
    }
    if matrix.column_scale is not None:
        tensors["column_scale"].copy_(matrix.column_scale)
    statistics = Statistics(matrix.largest, weight.device, histograms)
    block_weights = BLOCK_WEIGHTS if weight.device.type == "cpu" else GPU_BLOCK_WEIGHTS
    step = max(1 if matrix.factor is None else FEEDBACK_ROWS, block_weights // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        prepared = prepare_rows(block, matrix, recipe)
        if matrix.factor is None:
            encoded = encode_groups(prepared, recipe, matrix.objective)
        else:
            encoded = encode_rows(prepared, recipe, matrix.factor)
        packed = pack_rows(
            encoded.codes, prepared.salient, prepared.scales, encoded.scales, layout, columns
        )
        for name, part in packed.items():
            _check_float16(part, name, where)
            tensors[name][start : start + step] = part
        values = encoded.codes.values.flatten(1)[:, :columns]
        if matrix.column_scale is not None:
            values = values * matrix.column_scale
        statistics.add(block, values, len(prepared.salient.index), prepared.salient.overflow)
    return Encoded(tensors, statistics, layout)


def prepare_matrix(
    weight: Tensor, recipe: Recipe, where: str, inputs: InputStatistics | None = None
) -> PreparedMatrix:
    """Find what all rows share: the column scale and the threshold of salient weights.

    Raises SourceError for NaN or infinite weights, UnfitError for weights that no scale can hold.
    """
    largest = _largest_magnitude(weight)
    if not math.isfinite(largest):
        raise non_finite(weight, where)
    layout, scale = recipe.layout, None
    if layout.column_scale:
        mean_square = inputs.mean_square if inputs else None
        scale = column_scale(weight, recipe.sinkhorn_iterations, mean_square)
    if largest >= 2**14:
        reach = float((weight if scale is None else weight / scale).abs().max())
        if reach >= 2**24:  # no scale holds it, and products of it would leave float32
            raise _too_large("row_scale" if layout.scale == "log8" else "scales", where)
    factor, objective = None, SQUARED_ERROR
    if inputs and inputs.hessian is not None:
        if not bool(inputs.hessian.isfinite().all()):
            raise SourceError(
                f"{where}: the Hessian of its inputs has values that are not finite; "
                "quantize without --feedback"
            )
        factor = feedback_factor(inputs.hessian.to(weight.device), scale)
    elif inputs and layout.trellis:
        objective = _output_error(inputs.mean_square.to(weight.device), scale, layout)
    return PreparedMatrix(scale, penalty(weight, recipe), largest, factor, objective)


def _output_error(mean_square: Tensor, scale: Tensor | None, layout: Layout) -> Objective:
    """The error of x·Wᵀ for uncorrelated inputs: E[x²]·s² over its mean counts in each column."""
    importance = input_sizes(mean_square)
    importance = importance if scale is None else importance * scale[0].square()
    return Objective(in_groups((importance / importance.mean())[None], layout.group_size)[0])


def prepare_rows(block: Tensor, matrix: PreparedMatrix, recipe: Recipe) -> PreparedRows:
    """Choose the salient weights of rows [R, K], float32, and find the scales of the rows."""
    layout, columns = recipe.layout, block.shape[1]
    target = block if matrix.column_scale is None else block / matrix.column_scale
    target = in_groups(target, layout.group_size)
    padding = -columns % layout.group_size
    salient = choose_salient(target, recipe, matrix.penalty)
    return PreparedRows(target, salient, row_scales(target, salient, recipe), padding)


def encode_groups(
    rows: PreparedRows, recipe: Recipe, objective: Objective = SQUARED_ERROR
) -> EncodedGroups:
    """Find scales and codes of all groups of `rows`; see `PreparedRows.groups` for some of them."""
    shrinks = SHRINKS if recipe.layout.trellis else SHRINKS[:1]
    codes, scales = find_codes(
        rows.target,
        rows.salient,
        rows.scales,
        group_scales(rows.target, rows.salient, rows.scales, recipe, shrinks),
        recipe.layout,
        padding=rows.padding,
        objective=objective,
    )
    return EncodedGroups(scales, codes)


def encode_rows(rows: PreparedRows, recipe: Recipe, factor: FeedbackFactor) -> EncodedGroups:
    """Find scales and codes of all groups of `rows` with error feedback."""
    codes, scales = find_codes_with_feedback(
        rows.target,
        rows.salient,
        rows.scales,
        group_scales(rows.target, rows.salient, rows.scales, recipe, SHRINKS),
        recipe.layout,
        factor,
        padding=rows.padding,
    )
    return EncodedGroups(scales, codes)


def encode(
    weight: Tensor,
    recipe: Recipe,
    where: str,
    inputs: InputStatistics | None = None,
    histograms: bool = True,
) -> Encoded:
    """Quantize and pack one weight.

    weight: [N, K], bfloat16, float16 or float32.
    where:  file and tensor, for errors.
    inputs: what is known of the inputs of its layer, if anything.
    histograms: whether the statistics need them, which is a quarter of the time.

    Raises SourceError for NaN or infinite weights, and UnfitError for weights too large for float16
    scales or whose error is far above what the recipe gives (`expected_if_ruined`).
    """
    encoded = encode_unchecked(weight, recipe, where, inputs, histograms)
    error, largest = encoded.statistics.relative_error, encoded.statistics.largest
    expected = expected_if_ruined(weight, recipe, error, inputs)
    if expected is not None:
        small = f"; its largest weight, {largest:.2g}, is too small for float16 scales"
        raise UnfitError(
            f"{where}: quantizing it leaves a relative error of {error:.2g} where its recipe gives "
            f"{expected:.2g} and zeros 1{small if largest < 2**-14 else ''}"
        )
    return encoded


def expected_if_ruined(
    weight: Tensor, recipe: Recipe, error: float, inputs: InputStatistics | None = None
) -> float | None:
    """The relative error that the recipe should leave in a weight, if `error` is far above it.

    Expected is what the recipe leaves in the same weight times the power of two that brings it to
    size 1. That changes no relative error unless scales leave float16's range, so a shape that
    suits a recipe badly is no fault: 4-bit codes leave .004 - .03 in normal, Laplace and Student-t
    weights, but up to .44 without salient weights where 99 % are zero. Far above is three times
    that and more than 4 * 4**-bits (normal weights get 1.0 - 1.3 * 4**-bits, rounded to nearest
    2.6 - 4); and 1 always, since zeros would be as good.

    weight: [N, K], finite;  error: relative, squared.
    """
    floor = 4 * 4.0**-recipe.layout.bits  # below it no weight is encoded twice
    if error <= floor:
        return None
    weight = weight.float() * power_of_two(_largest_magnitude(weight))
    expected = encode_unchecked(
        weight, recipe, "size 1", inputs, histograms=False
    ).statistics.relative_error
    return None if error <= max(3 * expected, floor) and error < 1 else expected


def non_finite(weight: Tensor, where: str) -> SourceError:
    """The error that names the first NaN or infinite weight."""
    row = next(r for r in range(weight.shape[0]) if not bool(weight[r].isfinite().all()))
    column = int((~weight[row].isfinite()).nonzero()[0])
    return SourceError(
        f"{where}: weight [{row}, {column}] is {float(weight[row, column])}; "
        "the checkpoint is damaged, or keep this tensor with --keep"
    )


def _largest_magnitude(weight: Tensor) -> float:
    """Largest |w|, 0 for an empty weight; not finite if any weight is not."""
    low, high = (float(bound) for bound in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    return max(high, -low)


def _check_float16(part: Tensor, name: str, where: str) -> None:
    if part.dtype == torch.float16 and not bool(part.isfinite().all()):
        raise _too_large(name, where)


def _too_large(name: str, where: str) -> UnfitError:
    return UnfitError(f"{where}: weights are too large for float16 '{name}'")
