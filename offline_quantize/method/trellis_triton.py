"""The trellis search on a GPU: one thread takes one group from its first weight to its last.

It does the arithmetic of `trellis.search_torch` in the same order, without fused multiply-adds, so
both give the same codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offline_quantize.method.trellis import Paths, best_of
from precalib_kernels.format.layout import Layout

GROUPS = 64  # of a program
WARPS = GROUPS // 32


def search_triton(
    weights: Tensor,
    unit: Tensor,
    low_bits: Tensor,
    layout: Layout,
    importance: Tensor | None = None,
) -> Paths:
    """The search on a GPU or in Triton's interpreter; arguments and results as of `trellis.search`.

    Its weights are read twice for each candidate; besides, a search takes half a byte per weight of
    memory.
    """
    count, size = weights.shape
    weights, low_bits = weights.contiguous(), low_bits.contiguous().view(torch.int32)
    factors = weights if importance is None else importance.contiguous()
    value, rank = entry_tables(layout, weights.device)
    survivors = torch.empty((size // 8, count), dtype=torch.int32, device=weights.device)

    def one(unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
        entries = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
        cost = torch.empty(count, dtype=torch.float32, device=weights.device)
        search_kernel[(triton.cdiv(count, GROUPS),)](
            weights, unit, low_bits, factors, value, rank, survivors, codes.view(torch.int32),
            entries, cost, count, SIZE=size, LIMIT=layout.codebook_limit,
            WEIGHTED=importance is not None, GROUPS=GROUPS, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
        return codes, entries, cost

    return best_of(one, unit.contiguous())


def entry_tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Value, and number in its subset, of the nearest entry in each subset: int32 [points].

    A word has a byte for each of the four subsets; points are -limit … limit.
    """
    codebook, limit = torch.tensor(layout.codebook_values, device="cpu"), layout.codebook_limit
    points = torch.arange(-limit, limit + 1, device="cpu")[:, None]
    subsets = [codebook[start::4] for start in range(4)]
    ranks = [(points - subset).abs().argmin(1) for subset in subsets]
    values = [subset[rank] for subset, rank in zip(subsets, ranks, strict=True)]
    value, rank = (
        torch.stack(parts, 1).to(torch.int8).view(torch.int32)[:, 0].to(device)
        for parts in (values, ranks)
    )
    return value, rank


@triton.jit(do_not_specialize=["groups"])
def search_kernel(
    weights,  # float32 [groups, SIZE]
    unit,  # float32 [groups]
    low_bits,  # int32 [groups, SIZE / 4], a byte per weight: 0, 1 or more, which is free
    importance,  # float32 [groups, SIZE] if WEIGHTED
    value_table,  # int32 [points], see `entry_tables`
    rank_table,  # int32 [points]
    survivors,  # workspace: int32 [SIZE / 8, groups]
    codes,  # out: int32 [groups, SIZE / 4], a byte per weight; meanwhile the points
    entries,  # out: float32 [groups, SIZE]
    least_cost,  # out: float32 [groups], in codebook units
    groups,
    SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program: GROUPS groups. A state is 2 · u[k] + u[k-1]."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    first = group.to(tl.int64) * SIZE
    scale = tl.load(unit + group, mask=inside, other=0.0)
    nothing = scale * 0.0
    endless = tl.full((GROUPS,), float("inf"), tl.float32)
    cost = (tl.zeros((GROUPS,), tl.float32), endless, endless, endless)
    for eight in tl.range(0, SIZE // 8):
        kept = tl.zeros((GROUPS,), tl.int32)
        for four in tl.static_range(2):
            k = eight * 8 + four * 4
            given = tl.load(low_bits + (first + k) // 4, mask=inside, other=0)
            points = tl.zeros((GROUPS,), tl.int32)
            for i in tl.static_range(4):
                x = scaled(tl.load(weights + first + k + i, mask=inside, other=0.0), scale)
                point = nearest_point(x, LIMIT)
                points |= point << 8 * i
                words = tl.load(value_table + point)
                factor = nothing
                if WEIGHTED:
                    factor = tl.load(importance + first + k + i, mask=inside, other=0.0)
                cost, picked = advance(
                    cost, x, words, (given >> 8 * i) & 0xFF, factor, endless, WEIGHTED
                )
                kept |= picked << 4 * (4 * four + i)
            tl.store(codes + (first + k) // 4, points, mask=inside)
        tl.store(survivors + eight * groups.to(tl.int64) + group, kept, mask=inside)

    state = tl.zeros((GROUPS,), tl.int32)
    least = cost[0]
    for s in tl.static_range(1, 4):
        state = tl.where(cost[s] < least, s, state)
        least = tl.where(cost[s] < least, cost[s], least)
    tl.store(least_cost + group, least, mask=inside)
    for turn in tl.range(0, SIZE // 8):
        eight = SIZE // 8 - 1 - turn
        kept = tl.load(survivors + eight * groups.to(tl.int64) + group, mask=inside, other=0)
        for half in tl.static_range(2):
            four = 1 - half
            at = (first + eight * 8 + four * 4) // 4
            points = tl.load(codes + at, mask=inside, other=0)
            found = tl.zeros((GROUPS,), tl.int32)
            for back in tl.static_range(4):
                i = 3 - back
                point = (points >> 8 * i) & 0xFF
                before = (kept >> (4 * (4 * four + i) + state)) & 1
                now = state >> 1
                last = state & 1
                shift = 8 * (2 * (now ^ before) + last)
                rank = (tl.load(rank_table + point) >> shift) & 0xFF
                entry = (tl.load(value_table + point) << (24 - shift)) >> 24
                found |= (2 * rank + now) << 8 * i
                tl.store(entries + at * 4 + i, entry.to(tl.float32), mask=inside)
                state = 2 * last + before
            tl.store(codes + at, found, mask=inside)


@triton.jit
def scaled(weight, scale):
    """Weights in units of codebook entries, zero where the product is not a number."""
    x = weight * scale
    return tl.where(x == x, x, 0.0)


@triton.jit
def nearest_point(x, LIMIT: tl.constexpr):
    """x rounded to the nearest integer, to the even one of two, between ±LIMIT, from 0 on.

    1.5 · 2**23 has its last place at one, so adding it rounds.
    """
    near = tl.minimum(tl.maximum(x, -LIMIT), LIMIT) + 12582912.0
    return near.to(tl.int32, bitcast=True) - (0x4B400000 - LIMIT)


@triton.jit
def advance(cost, x, words, given, factor, endless, WEIGHTED: tl.constexpr):
    """Costs of the best path to each state after a weight, and of which state before it each came.

    The latter is a bit per state: u[k-2].  given: 0, 1 or more, which is free.
    """
    errors = ()
    for subset in tl.static_range(4):
        distance = x - ((words << (24 - 8 * subset)) >> 24).to(tl.float32)
        error = distance * distance
        if WEIGHTED:
            error = error * factor
        errors = errors + (tl.where(given > 1, error, 0.0),)
    reached = ()
    picked = tl.zeros_like(words)
    for state in tl.static_range(4):
        from_zero = cost[2 * (state % 2)] + errors[state]
        from_one = cost[2 * (state % 2) + 1] + errors[state ^ 2]
        better = from_one < from_zero
        picked |= better.to(tl.int32) << state
        constraint = tl.where(given == 1 - state // 2, endless, 0.0)
        reached = reached + (tl.where(better, from_one, from_zero) + constraint,)
    return reached, picked
