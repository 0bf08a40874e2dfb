"""What the search with error feedback is given, and what it finds."""

import dataclasses

from torch import Tensor

from offline_quantize.method.feedback_factor import FeedbackFactor
from offline_quantize.method.salient_steps import SalientSteps
from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class FeedbackTask:
    """Rows to encode, each tensor contiguous; see `find_codes_with_feedback`.

    target:  float32 [R, G * group_size];  mask: uint8 like it, 1 at salient places.
    columns: K, without the padding.
    unit:    codebook units per weight unit, [C, R, G] for C candidates;  step: the inverse, as
             decoded;  zero: the zero point, or None.
    grid:    of salient values; None if the layout has none.
    """

    target: Tensor
    mask: Tensor
    columns: int
    factor: FeedbackFactor
    unit: Tensor
    step: Tensor
    zero: Tensor | None
    grid: SalientSteps | None
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found.

    codes:  uint8 [R, G * group_size], whole codes at salient places, elsewhere base codes.
    values: float32 like it, what they stand for, but for the column scale.
    chosen: uint8 [R, G], the candidate that each group got.
    """

    codes: Tensor
    values: Tensor
    chosen: Tensor
