"""The path of least squared error through each group's trellis (Viterbi search).

The state after weight k is (u[k], u[k-1]), the low bits of two codes. A weight's level index
modulo 4, its subset, is 2 * (u[k] ^ u[k-2]) + u[k-1]; within a subset the nearest level is best.
The search is compiled. Without a compiler a torch version, equal bit for bit, takes about forty
times as long, and quantizing as a whole about seven times.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build

SOURCE = Path(__file__).parent / "csrc" / "viterbi.cpp"


def trellis_search(
    grouped: Tensor, scale: Tensor, layout: Layout, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and level values (float32) of the best paths, [R, G, group_size].

    grouped: weights, float32 [R, G, group_size];  scale: as decoded, [R, G].
    forced:  uint8 like `grouped`: 0 or 1 where the low bit of the code is given (salient weights,
             whose value the trellis does not set, and padding); 2 for ordinary weights.
    """
    unit = torch.where(scale > 0, layout.codebook_limit / scale, 0).flatten()
    weights, forced = (t.reshape(len(unit), -1).contiguous() for t in (grouped, forced))
    codes, level = search(weights, unit, forced, layout)
    return codes.view(grouped.shape), level.view(grouped.shape)


def search(weights: Tensor, unit: Tensor, forced: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Codes and level values [n, group_size] of n groups, by the fastest search there is.

    unit: [n], levels per weight unit. A product of weight and unit that is not a number counts as
          zero, so any input gives codes that exist.
    """
    native = _native() if weights.device.type == "cpu" else None
    if native is None:
        return search_torch(weights, unit, forced, layout)
    return search_native(weights, unit, forced, layout, native)


def search_native(
    weights: Tensor, unit: Tensor, forced: Tensor, layout: Layout, library: ctypes.CDLL
) -> tuple[Tensor, Tensor]:
    """Compiled search; weights and forced [n, group_size], unit [n] levels per weight unit."""
    levels = torch.tensor(layout.codebook_values, dtype=torch.int32)
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    level = torch.empty(weights.shape)
    unit, forced = unit.contiguous(), forced.contiguous()
    library.trellis_search(
        *(ctypes.c_void_p(t.data_ptr()) for t in (weights, unit, forced, levels)),
        ctypes.c_int32(len(levels)),
        ctypes.c_int32(layout.codebook_limit),
        ctypes.c_int64(weights.shape[0]),
        ctypes.c_int32(weights.shape[1]),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(level.data_ptr()),
    )
    return codes, level


def search_torch(
    weights: Tensor, unit: Tensor, forced: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The same search in torch, all groups at once."""
    count, size = weights.shape
    limit = layout.codebook_limit
    levels = torch.tensor(layout.codebook_values)
    points = torch.arange(-limit, limit + 1)[:, None]
    subsets = [levels[start::4] for start in range(4)]
    rank = torch.stack([(points - subset).abs().argmin(1) for subset in subsets])  # [4, points]
    value = torch.stack([subset[r] for subset, r in zip(subsets, rank, strict=True)]).float()

    scaled = (weights * unit[:, None]).T.contiguous()  # [g, n]
    scaled.masked_fill_(scaled.isnan(), 0.0)
    point = scaled.round().clamp_(-limit, limit).add_(limit).int()
    error = torch.stack([scaled - subset[point] for subset in value], 1).square_()  # [g, 4, n]
    given = forced.T
    error.masked_fill_((given < 2)[:, None], 0.0)
    barrier = torch.zeros_like(error[:, :2])  # [g, u, n]
    barrier[:, 0].masked_fill_(given == 1, torch.inf)
    barrier[:, 1].masked_fill_(given == 0, torch.inf)

    cost = torch.full((2, 2, count), torch.inf)  # [u[k-1], u[k-2], n]
    cost[0, 0] = 0
    came = torch.empty((size, 2, 2, count), dtype=torch.bool)  # u[k-2] of the best way here
    for k in range(size):
        by_subset = error[k].view(2, 2, -1)  # [u[k] ^ u[k-2], u[k-1]]
        stay = cost[:, 0] + by_subset  # u[k-2] = 0: [u[k], u[k-1]]
        turn = cost[:, 1] + by_subset.flip(0)  # u[k-2] = 1
        torch.lt(turn, stay, out=came[k])
        cost = torch.minimum(stay, turn) + barrier[k][:, None]
    low, subset = _trace(cost, came)
    # index = 4 * rank + subset and code ^ u[k-2] = index >> 1, so the code is 2 * rank + u[k]
    codes = (2 * rank[subset, point.long()] + low).to(torch.uint8)
    return codes.T.contiguous(), value[subset, point.long()].T.contiguous()


def _trace(cost: Tensor, came: Tensor) -> tuple[Tensor, Tensor]:
    """Low bits of the codes and subsets, both [g, n], along the best paths, found backwards."""
    size, count = came.shape[0], came.shape[-1]
    state = cost.view(4, -1).argmin(0)  # 2 * u[k] + u[k-1]
    lane = torch.arange(count)
    ways = came.view(size, 4, count)
    low = torch.empty((size, count), dtype=torch.int64)
    subset = torch.empty((size, count), dtype=torch.int64)
    for k in range(size - 1, -1, -1):
        before = ways[k][state, lane].long()  # u[k-2]
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
