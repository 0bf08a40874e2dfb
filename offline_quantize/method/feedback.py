"""Codes of whole rows with error feedback: each error moves the targets of later columns.

Columns are taken from the first to the last. What the error of a column does to the loss is made
good in later ones (GPTQ, arXiv 2210.17323). Inside a group with a trellis each state keeps the
errors of the best path to it, so the Viterbi search makes the loss itself small. Salient weights
take part: their low bits force the path as ever, their errors are fed on like any others. Each
group is searched with a few scales, and the one of least loss is taken.

The loop is compiled, by g++ for the CPU and by Triton for a GPU and a trellis. Where neither can
be, a torch version gives the same codes, bit for bit.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import reciprocal
from offline_quantize.method.codes import Codes
from offline_quantize.method.feedback_factor import FeedbackFactor
from offline_quantize.method.feedback_task import FeedbackTask, Found
from offline_quantize.method.feedback_torch import BLOCK, encode_torch
from offline_quantize.method.salience import SalientWeights
from offline_quantize.method.salient_steps import SalientSteps
from offline_quantize.method.scales import GroupScales, RowScales, choose_scales
from precalib_kernels.backends.triton.backend import has_triton
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build

SOURCE = Path(__file__).parent / "csrc" / "feedback.cpp"


def find_codes_with_feedback(
    target: Tensor,
    salient: SalientWeights,
    rows: RowScales,
    candidates: Sequence[GroupScales],
    layout: Layout,
    factor: FeedbackFactor,
    *,
    padding: int = 0,
) -> tuple[Codes, GroupScales]:
    """Codes of whole rows that make the loss (target − values)·H·(target − values)ᵀ small.

    target:     float32 [R, G, group_size], all groups of the rows.
    candidates: scales that each group may have; of equally good ones it gets the first.
    padding:    number of columns at the end of the last group that are none.
    returns:    the codes, and the scales that they are for.
    """
    flat = target.flatten(1).contiguous()
    mask = torch.zeros_like(target, dtype=torch.uint8)
    salient.scatter(mask, salient.used)
    zeros = [groups.zero for groups in candidates if groups.zero is not None]
    task = FeedbackTask(
        target=flat,
        mask=mask.flatten(1),
        columns=flat.shape[1] - padding,
        factor=factor,
        unit=torch.stack([_units(groups, layout) for groups in candidates]),
        step=torch.stack([groups.step for groups in candidates]),
        zero=torch.stack(zeros) if zeros else None,
        grid=SalientSteps.of(rows, layout) if layout.salient_count else None,
        layout=layout,
    )
    found = _search(task)
    whole, values = found.codes.view(target.shape), found.values.view(target.shape)
    wide = salient.gather(whole)
    codes = Codes(whole.bitwise_and_(2**layout.bits - 1), wide, values)
    return codes, choose_scales(candidates, found.chosen)


def _search(task: FeedbackTask) -> Found:
    if task.target.device.type == "cpu":
        native = _native()
        return encode_torch(task) if native is None else encode_native(task, native)
    if task.layout.trellis and task.columns % BLOCK == 0 and has_triton():
        from offline_quantize.method.feedback_triton import encode_triton

        return encode_triton(task)
    return encode_torch(task)


def encode_native(task: FeedbackTask, library: ctypes.CDLL) -> Found:
    """The compiled search, for tensors of the CPU."""
    layout, codebook = task.layout, None
    candidates, rows, groups = task.unit.shape
    found = Found(
        torch.zeros_like(task.mask),
        torch.zeros_like(task.target),
        torch.zeros(rows, groups, dtype=torch.uint8, device="cpu"),
    )
    if not layout.uniform:
        codebook = torch.tensor(layout.codebook_values, dtype=torch.int32, device="cpu")
    grid = task.grid
    fields = _Task(
        rows, task.columns, layout.group_size, groups, candidates,
        *map(_address, (task.target, task.factor.effects, task.factor.importance, task.mask)),
        *map(_address, (task.unit, task.step, task.zero, codebook)),
        layout.codebook_size, layout.codebook_limit, int(layout.trellis),
        *map(_address, (grid.inverse, grid.scale, grid.offset) if grid else (None, None, None)),
        *((grid.low, grid.high, grid.bias, grid.sign) if grid else (0, 0, 0, 0)),
        *map(_address, (found.codes, found.values, found.chosen)),
    )  # fmt: skip
    if library.encode_with_feedback(ctypes.byref(fields)):
        raise MemoryError("for error feedback")
    return found


class _Task(ctypes.Structure):
    """FeedbackTask of csrc/feedback.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("group_size", "groups", "candidates")),
        *((name, ctypes.c_void_p) for name in ("weights", "effects", "importance", "salient")),
        *((name, ctypes.c_void_p) for name in ("unit", "step", "zero", "codebook")),
        *((name, ctypes.c_int32) for name in ("codebook_size", "limit", "trellis")),
        *((f"salient_{name}", ctypes.c_void_p) for name in ("inverse", "scale", "offset")),
        *((f"salient_{name}", ctypes.c_int32) for name in ("low", "high", "bias", "sign")),
        *((name, ctypes.c_void_p) for name in ("codes", "values", "chosen")),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _units(groups: GroupScales, layout: Layout) -> Tensor:
    """Codebook units per weight unit, rounded as where codes are found without feedback."""
    if layout.uniform:
        return reciprocal(groups.step)
    if layout.trellis:
        return torch.where(groups.scale > 0, layout.codebook_limit / groups.scale, 0)
    return layout.codebook_limit * reciprocal(groups.scale)


@functools.cache
def _native() -> ctypes.CDLL | None:
    try:
        return build.load(SOURCE)
    except build.BuildError as error:
        warnings.warn(f"error feedback is not compiled and will be slow: {error}", stacklevel=2)
        return None
