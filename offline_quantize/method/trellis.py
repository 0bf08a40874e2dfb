"""The path of least squared error through each group's trellis (Viterbi search).

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
from pathlib import Path

import torch
from torch import Tensor

from precalib_kernels.backends.triton.backend import has_triton
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain import compile as build

SOURCE = Path(__file__).parent / "csrc" / "viterbi.cpp"
FREE = 2  # a low bit that the search may choose; csrc/viterbi.cpp has the same number


def trellis_search(
    target: Tensor,
    scale: Tensor,
    layout: Layout,
    low_bits: Tensor,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and codebook entries (float32) of the best paths, [R, G, group_size].

    target:     weights, float32 [R, G, group_size];  scale: as decoded, [R, G].
    low_bits:   uint8 like `target`: 0, 1 or FREE.
    importance: factor of each weight's squared error, [R, G, group_size], or of each column's,
                [G, group_size]; None for 1.
    """
    unit = torch.where(scale > 0, layout.codebook_limit / scale, 0).flatten()
    weights, given = (t.reshape(len(unit), -1).contiguous() for t in (target, low_bits))
    if importance is not None:
        importance = importance.expand(target.shape).reshape(weights.shape).contiguous()
    codes, entries = search(weights, unit, given, layout, importance)
    return codes.view(target.shape), entries.view(target.shape)


def search(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and codebook entries [n, group_size] of n groups, by the fastest search there is.

    weights, low_bits: [n, group_size].
    unit:       [n], codebook units per weight unit. A product of weight and unit that is not a
                number counts as zero, so any input gives codes that exist.
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
) -> tuple[Tensor, Tensor]:
    """The compiled search, for tensors of the CPU; arguments and results as of `search`."""
    cpu = torch.device("cpu")
    codebook = torch.tensor(layout.codebook_values, dtype=torch.int32, device=cpu)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=cpu)
    entries = torch.empty(weights.shape, dtype=torch.float32, device=cpu)
    unit, low_bits = unit.contiguous(), low_bits.contiguous()
    short = library.trellis_search(
        *(ctypes.c_void_p(t.data_ptr()) for t in (weights, unit, low_bits)),
        ctypes.c_void_p(None if importance is None else importance.data_ptr()),
        ctypes.c_void_p(codebook.data_ptr()),
        ctypes.c_int32(len(codebook)),
        ctypes.c_int32(layout.codebook_limit),
        ctypes.c_int64(weights.shape[0]),
        ctypes.c_int32(weights.shape[1]),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(entries.data_ptr()),
    )
    if short:
        raise MemoryError("for the trellis search")
    return codes, entries


def search_torch(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same search in torch, on any device, all groups at once."""
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
    return codes.T.contiguous(), value[subset, point.long()].T.contiguous()


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
