"""The path of least squared error through each group's trellis (Viterbi search).

Where a group may have several scales, the one with which the error is least is taken.

The state after weight k is (u[k], u[k-1]), the low bits of two codes. The index of its
codebook entry modulo 4, its subset, is 2 * (u[k] ^ u[k-2]) + u[k-1]; within a subset the nearest
entry is best.
The search is compiled, by g++ for the CPU and by Triton for a GPU (`trellis_triton`). Without a
compiler a torch version, equal bit for bit, takes about forty times as long on a CPU, and
quantizing as a whole about seven times.

`low_bits` says which low bits are given: 0 or 1 at salient places, whose value the trellis does not
set, and in the padding of a ragged group; FREE for all others.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import reciprocal
from precalib_kernels.backends.triton.backend import has_triton
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build

SOURCE = Path(__file__).parent / "csrc" / "viterbi.cpp"
FREE = 2  # a low bit that the search may choose; csrc/viterbi.cpp has the same number


def trellis_search(
    target: Tensor,
    scales: Tensor,
    layout: Layout,
    low_bits: Tensor,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8) and codebook entries (float32) of the best paths, [R, G, group_size].

    target:     weights, float32 [R, G, group_size].
    scales:     those that each group may have, as decoded, [candidates, R, G].
    low_bits:   uint8 like `target`: 0, 1 or FREE.
    importance: factor of each weight's squared error, [R, G, group_size], or of each column's,
                [G, group_size]; None for 1.
    returns:    also the number of the scale that they are for, uint8 [R, G].
    """
    unit = torch.where(scales > 0, layout.codebook_limit / scales, 0).flatten(1)
    weights, given = (t.reshape(unit.shape[1], -1).contiguous() for t in (target, low_bits))
    if importance is not None:
        importance = importance.expand(target.shape).reshape(weights.shape).contiguous()
    found = search(weights, unit, given, layout, importance)
    return (
        found.codes.view(target.shape),
        found.entries.view(target.shape),
        found.chosen.view(target.shape[:2]),
    )


class Paths(NamedTuple):
    """The best paths of n groups.

    codes, entries: uint8 and float32 [n, group_size].
    chosen:         which unit they are for, uint8 [n].
    """

    codes: Tensor
    entries: Tensor
    chosen: Tensor


def search(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None = None,
) -> Paths:
    """The best paths of n groups, by the fastest search there is.

    weights, low_bits: [n, group_size].
    unit:       [candidates, n], codebook units per weight unit; of equally good ones a group gets
                the first. A product of weight and unit that is not a number counts as zero, so any
                input gives codes that exist.
    importance: [n, group_size], or None for 1.
    """
    native = _native() if weights.device.type == "cpu" else None
    if native is not None:
        return search_native(weights, unit, low_bits, layout, native, importance)
    if weights.device.type == "cuda" and has_triton():
        from offline_quantize.method.trellis_triton import search_triton

        return search_triton(weights, unit, low_bits, layout, importance)
    return search_torch(weights, unit, low_bits, layout, importance)


def search_native(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    library: ctypes.CDLL,
    importance: Tensor | None = None,
) -> Paths:
    """The compiled search, for tensors of the CPU; arguments and results as of `search`."""
    cpu = torch.device("cpu")
    codebook = torch.tensor(layout.codebook_values, dtype=torch.int32, device=cpu)
    found = Paths(
        torch.empty(weights.shape, dtype=torch.uint8, device=cpu),
        torch.empty(weights.shape, dtype=torch.float32, device=cpu),
        torch.empty(len(weights), dtype=torch.uint8, device=cpu),
    )
    unit, low_bits = unit.contiguous(), low_bits.contiguous()
    step = reciprocal(unit)
    short = library.trellis_search(
        *(ctypes.c_void_p(t.data_ptr()) for t in (weights, unit, step)),
        ctypes.c_int32(len(unit)),
        ctypes.c_void_p(low_bits.data_ptr()),
        ctypes.c_void_p(None if importance is None else importance.data_ptr()),
        ctypes.c_void_p(codebook.data_ptr()),
        ctypes.c_int32(len(codebook)),
        ctypes.c_int32(layout.codebook_limit),
        ctypes.c_int64(weights.shape[0]),
        ctypes.c_int32(weights.shape[1]),
        *(ctypes.c_void_p(t.data_ptr()) for t in found),
    )
    if short:
        raise MemoryError("for the trellis search")
    return found


def best_of(one: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], unit: Tensor) -> Paths:
    """The best paths over all units, one search after the other.

    one: codes, entries and least cost, in codebook units, of the groups with one unit each.
    """
    step = reciprocal(unit)
    codes, entries, cost = one(unit[0])
    least = cost * step[0] * step[0]
    chosen = torch.zeros(len(least), dtype=torch.uint8, device=least.device)
    for candidate in range(1, len(unit)):
        more_codes, more_entries, cost = one(unit[candidate])
        loss = cost * step[candidate] * step[candidate]
        better = loss < least
        least = torch.where(better, loss, least)
        chosen.masked_fill_(better, candidate)
        codes = torch.where(better[:, None], more_codes, codes)
        entries = torch.where(better[:, None], more_entries, entries)
    return Paths(codes, entries, chosen)


def search_torch(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None = None,
) -> Paths:
    """The same search in torch, on any device, all groups at once."""

    def one(unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _search_torch(weights, unit, low_bits, layout, importance)

    return best_of(one, unit)


def _search_torch(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, entries and least cost for one unit of each group, [n]."""
    count, size = weights.shape
    limit, device = layout.codebook_limit, weights.device
    codebook = torch.tensor(layout.codebook_values, device=device)
    points = torch.arange(-limit, limit + 1, device=device)[:, None]
    subsets = [codebook[start::4] for start in range(4)]
    rank = torch.stack([(points - subset).abs().argmin(1) for subset in subsets])  # [4, points]
    value = torch.stack([subset[r] for subset, r in zip(subsets, rank, strict=True)]).float()

    scaled = (weights * unit[:, None]).T.contiguous()  # [g, n]
    scaled.masked_fill_(scaled.isnan(), 0.0)
    point = scaled.round().clamp_(-limit, limit).add_(limit).int()
    # [g, 4, n]: of each subset
    branch_metrics = torch.stack([scaled - subset[point] for subset in value], 1).square_()
    if importance is not None:
        branch_metrics *= importance.T[:, None]
    given = low_bits.T
    branch_metrics.masked_fill_((given != FREE)[:, None], 0.0)
    # [g, u, n]: infinite where u is not the given bit
    constraint_cost = torch.zeros_like(branch_metrics[:, :2])
    constraint_cost[:, 0].masked_fill_(given == 1, torch.inf)
    constraint_cost[:, 1].masked_fill_(given == 0, torch.inf)

    cost = torch.full(
        (2, 2, count), torch.inf, dtype=torch.float32, device=device
    )  # [u[k-1], u[k-2], n]
    cost[0, 0] = 0
    # u[k-2] of the best path to each state
    survivors = torch.empty((size, 2, 2, count), dtype=torch.bool, device=device)
    for k in range(size):
        metric = branch_metrics[k].view(2, 2, -1)  # [u[k] ^ u[k-2], u[k-1]]
        from_zero = cost[:, 0] + metric  # u[k-2] = 0: [u[k], u[k-1]]
        from_one = cost[:, 1] + metric.flip(0)  # u[k-2] = 1
        torch.lt(from_one, from_zero, out=survivors[k])
        cost = torch.minimum(from_zero, from_one) + constraint_cost[k][:, None]
    low, subset = _trace(cost, survivors)
    # index = 4 * rank + subset and code ^ u[k-2] = index >> 1, so the code is 2 * rank + u[k]
    codes = (2 * rank[subset, point.long()] + low).to(torch.uint8)
    entries = value[subset, point.long()].T.contiguous()
    return codes.T.contiguous(), entries, cost.view(4, -1).amin(0)


def _trace(cost: Tensor, survivors: Tensor) -> tuple[Tensor, Tensor]:
    """Low bits of the codes and subsets, both [g, n], along the best paths, found backwards."""
    size, count = survivors.shape[0], survivors.shape[-1]
    state = cost.view(4, -1).argmin(0)  # 2 * u[k] + u[k-1]
    group = torch.arange(count, device=cost.device)
    steps = survivors.view(size, 4, count)
    low = torch.empty((size, count), dtype=torch.int64, device=cost.device)
    subset = torch.empty((size, count), dtype=torch.int64, device=cost.device)
    for k in range(size - 1, -1, -1):
        before = steps[k][state, group].long()  # u[k-2]
        now, last = state >> 1, state & 1
        low[k], subset[k] = now, 2 * (now ^ before) + last
        state = 2 * last + before
    return low, subset


@functools.cache
def _native() -> ctypes.CDLL | None:
    try:
        return build.load(SOURCE)
    except build.BuildError as error:
        warnings.warn(f"the trellis search is not compiled and will be slow: {error}", stacklevel=2)
        return None
