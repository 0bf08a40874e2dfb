"""Error feedback through a trellis on a GPU: one thread takes a group of a row through the search.

It does the arithmetic of `feedback_torch.py` in the same order, without fused multiply-adds, so
both give the same codes. Group by group, `search_kernel` goes through all rows with each of the
scales, `trace_kernel` writes the codes of the best, and `push_kernel` moves the targets of the
columns after the group.
"""

import torch
import triton
import triton.language as tl

from offline_quantize.method.feedback_task import FeedbackTask, Found
from offline_quantize.method.feedback_torch import BLOCK, STATES
from offline_quantize.method.trellis_triton import entry_tables, nearest_point

ROWS = 32  # of a program of the search: one warp
TRACE_ROWS = 128
PUSH_ROWS, PUSH_COLUMNS = 128, 16  # of a program that moves targets


def encode_triton(task: FeedbackTask) -> Found:
    """The search on a GPU or in Triton's interpreter, for layouts with a trellis.

    Tensors of the kernels are [column, row], so that threads side by side read neighbours.
    """
    layout, device = task.layout, task.target.device
    candidates, rows, groups = task.unit.shape
    size, columns = layout.group_size, task.columns
    weight = task.target.T[:columns].contiguous()
    mask = task.mask.T[:columns].contiguous()
    target = weight.clone()
    values = torch.zeros((groups * size, rows), device=device)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=device)
    chosen = torch.zeros((groups, rows), dtype=torch.uint8, device=device)
    unit, step = (each.permute(0, 2, 1).contiguous() for each in (task.unit, task.step))
    value_table, rank_table = entry_tables(layout, device)
    moved = torch.empty((candidates, STATES, size, rows), device=device)
    found_values = torch.empty_like(moved)
    words = torch.empty((candidates, size, rows), dtype=torch.int32, device=device)
    ways = torch.empty_like(words)
    loss = torch.empty((candidates, rows), device=device)
    ends = torch.empty((candidates, rows), dtype=torch.int32, device=device)
    grid = task.grid
    steps = (grid.inverse, grid.scale, grid.offset) if grid else (target, target, target)
    numbers = (grid.low, grid.high, grid.bias, grid.sign) if grid else (0, 0, 0, 0)
    block_errors = torch.empty((candidates, STATES, BLOCK, rows), device=device)
    kept = found_values, words, ways
    for group in range(groups):
        start = group * size
        count = min(size, columns - start)
        search_kernel[(triton.cdiv(rows, ROWS), candidates)](
            target, weight, mask, task.factor.effects, task.factor.importance, unit, step,
            value_table, rank_table, *steps, *numbers, moved, *kept, block_errors, loss, ends, rows,
            columns, groups, group, start, count, size, LIMIT=layout.codebook_limit,
            SALIENT=grid is not None, SIGN=bool(numbers[3]), ROWS=ROWS, BLOCK=BLOCK,
            num_warps=ROWS // 32, enable_fp_fusion=False,
        )  # fmt: skip
        trace_kernel[(triton.cdiv(rows, TRACE_ROWS),)](
            *kept, loss, ends, codes, values, chosen, rows, group, candidates, start, count, size,
            ROWS=TRACE_ROWS, num_warps=TRACE_ROWS // 32,
        )  # fmt: skip
        later = columns - start - count
        if later:
            programs = triton.cdiv(rows, PUSH_ROWS), triton.cdiv(later, PUSH_COLUMNS)
            push_kernel[programs](
                target, weight, values, task.factor.effects, rows, columns, start, count,
                ROWS=PUSH_ROWS, COLUMNS=PUSH_COLUMNS, BLOCK=BLOCK, num_warps=PUSH_ROWS // 32,
                enable_fp_fusion=False,
            )  # fmt: skip
    return Found(codes.T.contiguous(), values.T.contiguous(), chosen.T.contiguous())


@triton.jit(
    do_not_specialize=[
        *("salient_low", "salient_high", "salient_bias", "salient_sign"),
        *("rows", "columns", "groups", "group", "start", "count", "size"),
    ]
)
def search_kernel(
    target,  # float32 [columns, rows], moved by the errors of earlier groups
    weight,  # float32 [columns, rows]
    mask,  # uint8 [columns, rows], 1 at salient places
    effects,  # float32 [columns, columns]
    importance,  # float32 [columns]
    unit,  # float32 [candidates, groups, rows]
    step,  # float32 [candidates, groups, rows]
    value_table,  # int32 [points], see `entry_tables`
    rank_table,  # int32 [points]
    salient_inverse,  # float32 [rows] if SALIENT, as the next two; see `SalientSteps`
    salient_scale,
    salient_offset,
    salient_low,
    salient_high,
    salient_bias,
    salient_sign,
    moved,  # workspace: float32 [candidates, 4, size, rows], a path's targets, moved by its errors
    values,  # workspace: float32 [candidates, 4, size, rows], a state's value after each column
    words,  # workspace: int32 [candidates, size, rows], a byte per state: its code
    ways,  # workspace: int32 [candidates, size, rows], a bit per state: which state before it
    block_errors,  # workspace: float32 [candidates, 4, BLOCK, rows]
    loss,  # workspace: float32 [candidates, rows]
    ends,  # workspace: int32 [candidates, rows], the state after the last column
    rows,
    columns,
    groups,
    group,
    start,
    count,  # of columns, a multiple of BLOCK
    size,
    LIMIT: tl.constexpr,
    SALIENT: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: ROWS rows of the columns [start, start + count) with one candidate for the scales.

    A state is 2 · u[k] + u[k-1]. The errors of a block of columns stay in registers; at its end
    they move the targets of the path's later columns of the group.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = tl.program_id(1)
    inside = row < rows
    stride = rows.to(tl.int64)
    effect_stride = columns.to(tl.int64)
    plane = size * stride
    of_candidate = candidate * plane + row
    of_paths = 4 * candidate * plane + row
    scales = (candidate * groups + group) * stride + row
    units = tl.load(unit + scales, mask=inside, other=0.0)
    steps = tl.load(step + scales, mask=inside, other=0.0)
    infinity = tl.full((ROWS,), float("inf"), tl.float32)
    zeros = tl.zeros((ROWS,), tl.float32)
    none = tl.zeros((ROWS,), tl.int32)
    inverse, scale, offset = zeros, zeros, zeros
    if SALIENT:
        inverse = tl.load(salient_inverse + row, mask=inside, other=0.0)
        scale = tl.load(salient_scale + row, mask=inside, other=0.0)
        offset = tl.load(salient_offset + row, mask=inside, other=0.0)
    for k in tl.range(0, count):
        first_target = tl.load(target + (start + k) * stride + row, mask=inside, other=0.0)
        for path in tl.static_range(4):
            tl.store(moved + of_paths + path * plane + k * stride, first_target, mask=inside)

    cost = (zeros, infinity, infinity, infinity)
    common = zeros  # what all paths cost besides
    index = tl.arange(0, BLOCK)
    empty = tl.zeros((BLOCK, ROWS), tl.float32)
    for first in tl.range(0, count, BLOCK):
        origin = (none, none + 1, none + 2, none + 3)  # the path at the block's begin
        errors = (empty, empty, empty, empty)  # of each path
        total = (empty, empty, empty, empty)  # what they add to the targets of the block
        for i in tl.range(0, BLOCK):
            k = first + i
            here = (index == i)[:, None]
            counts = tl.load(importance + start + k)
            original = tl.load(weight + (start + k) * stride + row, mask=inside, other=0.0)
            targets = ()
            for path in tl.static_range(4):
                at = of_paths + origin[path] * plane + k * stride
                base = tl.load(moved + at, mask=inside, other=0.0)
                targets = targets + (base + tl.sum(tl.where(here, total[path], 0.0), 0),)
            metrics, codes, found = branch_metrics(
                targets, units, steps, counts, value_table, rank_table, LIMIT
            )
            if SALIENT:
                salient = tl.load(mask + (start + k) * stride + row, mask=inside, other=0) != 0
                metrics, codes, found, least = force_salient(
                    metrics, codes, found, targets, salient, counts, units, inverse, scale, offset,
                    salient_low, salient_high, salient_bias, salient_sign, infinity, SIGN,
                )  # fmt: skip
                common += tl.where(salient, least, 0.0)
            cost, came_from = advance(cost, metrics)
            effect = tl.load(effects + (start + k) * effect_stride + start + first + index)
            word = none
            origin_next = ()
            errors_next = ()
            total_next = ()
            for state in tl.static_range(4):
                second = ((came_from >> state) & 1) != 0
                value = way_taken(second, found, state)
                word |= way_taken(second, codes, state) << 8 * state
                tl.store(values + of_paths + state * plane + k * stride, value, mask=inside)
                error = (original - value)[None, :]
                both = second[None, :]
                origin_next = origin_next + (path_before(second, origin, state),)
                errors_next = errors_next + (
                    tl.where(here, error, path_before(both, errors, state)),
                )
                total_next = total_next + (
                    path_before(both, total, state) + error * effect[:, None],
                )
            origin, errors, total = origin_next, errors_next, total_next
            tl.store(words + of_candidate + k * stride, word, mask=inside)
            tl.store(ways + of_candidate + k * stride, came_from, mask=inside)
        for path in tl.static_range(4):
            kept = ((4 * candidate + path) * BLOCK + index)[:, None] * stride + row[None, :]
            tl.store(block_errors + kept, errors[path], mask=inside[None, :])
        tl.debug_barrier()
        for later in tl.range(first + BLOCK, count, BLOCK):
            column = (later + index)[:, None] * stride
            base = ()
            for path in tl.static_range(4):
                before = (of_paths + origin[path] * plane)[None, :] + column
                base = base + (tl.load(moved + before, mask=inside[None, :], other=0.0),)
            total = (empty, empty, empty, empty)
            for j in tl.range(0, BLOCK):
                effect = tl.load(
                    effects + (start + first + j) * effect_stride + start + later + index
                )
                total_next = ()
                for path in tl.static_range(4):
                    one = ((4 * candidate + path) * BLOCK + j) * stride + row
                    moving = tl.load(block_errors + one, mask=inside, other=0.0)
                    total_next = total_next + (total[path] + moving[None, :] * effect[:, None],)
                total = total_next
            for path in tl.static_range(4):
                after = (of_paths + path * plane)[None, :] + column
                tl.store(moved + after, base[path] + total[path], mask=inside[None, :])
        tl.debug_barrier()

    end = none
    least = cost[0]
    for state in tl.static_range(1, 4):
        end = tl.where(cost[state] < least, state, end)
        least = tl.where(cost[state] < least, cost[state], least)
    tl.store(loss + candidate * stride + row, (least + common) * steps * steps, mask=inside)
    tl.store(ends + candidate * stride + row, end, mask=inside)


@triton.jit
def branch_metrics(targets, units, steps, counts, value_table, rank_table, LIMIT: tl.constexpr):
    """Cost, code and value of each way on, [2 * state before + u[k]], by the nearest entries."""
    metrics = ()
    codes = ()
    found = ()
    for path in tl.static_range(4):
        x = targets[path] * units
        x = tl.where(x == x, x, 0.0)
        point = nearest_point(x, LIMIT)
        values = tl.load(value_table + point)
        ranks = tl.load(rank_table + point)
        for u in tl.static_range(2):
            entry, code = entry_of(values, ranks, u, 2 * (u ^ (path % 2)) + path // 2)
            distance = x - entry
            metrics = metrics + (distance * distance * counts,)
            codes = codes + (code,)
            found = found + (entry * steps,)
    return metrics, codes, found


@triton.jit
def entry_of(values, ranks, low, SUBSET: tl.constexpr):
    """The nearest entry of a subset, and the code for it with this low bit."""
    entry = ((values << (24 - 8 * SUBSET)) >> 24).to(tl.float32)
    return entry, 2 * ((ranks >> 8 * SUBSET) & 0xFF) + low


@triton.jit
def force_salient(
    metrics, codes, found, targets, here, counts, units, inverse, scale, offset, low, high, bias,
    sign, infinity, SIGN: tl.constexpr,
):  # fmt: skip
    """At salient places the salient code, on the ways that its low bit allows.

    Also returned: the least cost of it, which is taken off the costs of all ways.
    """
    wide_codes = ()
    wide_values = ()
    extras = ()
    for path in tl.static_range(4):
        code, value = nearest_step(
            targets[path], inverse, scale, offset, low, high, bias, sign, SIGN
        )
        distance = (targets[path] - value) * units
        wide_codes = wide_codes + (code,)
        wide_values = wide_values + (value,)
        extras = extras + (distance * distance * counts,)
    least = extras[0]  # type: ignore[misc]
    for path in tl.static_range(1, 4):
        least = tl.where(extras[path] < least, extras[path], least)
    forced = ()
    all_codes = ()
    all_values = ()
    for path in tl.static_range(4):
        extra = extras[path] - least
        extra = tl.where(extra == extra, extra, 0.0)
        for u in tl.static_range(2):
            fits = tl.where((wide_codes[path] & 1) == u, extra, infinity)
            forced = forced + (tl.where(here, fits, metrics[2 * path + u]),)
            all_codes = all_codes + (tl.where(here, wide_codes[path], codes[2 * path + u]),)
            all_values = all_values + (tl.where(here, wide_values[path], found[2 * path + u]),)
    return forced, all_codes, all_values, least


@triton.jit
def nearest_step(target, inverse, scale, offset, low, high, bias, sign, SIGN: tl.constexpr):
    """Code and value of the nearest point of each row's grid, as `SalientSteps.nearest`.

    1.5 · 2**23 has its last place at one, so adding it rounds to the even of two.
    """
    size = tl.abs(target) if SIGN else target
    steps = (size - offset) * inverse
    steps = tl.where(steps == steps, steps, 0.0)
    limited = tl.minimum(tl.maximum(steps, low.to(tl.float32)), high.to(tl.float32))
    rounded = (limited + 12582912.0) - 12582912.0
    value, code = offset + scale * rounded, rounded.to(tl.int32) + bias
    if SIGN:
        negative = target < 0.0
        code = tl.where(negative, code + sign, code)
        value = tl.where(negative, -value, value)
    return code, value


@triton.jit
def advance(cost, metrics):
    """Costs of the best path to each state, and of which state before it each came, a bit a state.

    metrics: of each way on, [2 * state before + u[k]].
    """
    reached = ()
    picked = tl.zeros(cost[0].shape, tl.int32)
    for state in tl.static_range(4):
        from_zero = cost[2 * (state % 2)] + metrics[4 * (state % 2) + state // 2]
        from_one = cost[2 * (state % 2) + 1] + metrics[4 * (state % 2) + 2 + state // 2]
        better = from_one < from_zero
        picked |= better.to(tl.int32) << state
        reached = reached + (tl.where(better, from_one, from_zero),)
    return reached, picked


@triton.jit
def way_taken(second, of_ways, STATE: tl.constexpr):
    """What belongs to the way by which a state was reached, of [2 * state before + u[k]]."""
    one = of_ways[4 * (STATE % 2) + STATE // 2]
    return tl.where(second, of_ways[4 * (STATE % 2) + 2 + STATE // 2], one)


@triton.jit
def path_before(second, of_paths, STATE: tl.constexpr):
    """What belongs to the path that a state continues."""
    return tl.where(second, of_paths[2 * (STATE % 2) + 1], of_paths[2 * (STATE % 2)])


@triton.jit(do_not_specialize=["rows", "group", "candidates", "start", "count", "size"])
def trace_kernel(
    found,  # as `values` of `search_kernel`, and the next four as there
    words,
    ways,
    loss,
    ends,
    codes,  # out: uint8 [columns, rows]
    values,  # out: float32 [columns, rows]
    chosen,  # out: uint8 [groups, rows]
    rows,
    group,
    candidates,
    start,
    count,
    size,
    ROWS: tl.constexpr,
):
    """Program: ROWS rows, along the best path of the candidate of least loss, from its end back."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    stride = rows.to(tl.int64)
    plane = size * stride
    best = tl.zeros((ROWS,), tl.int32)
    least = tl.load(loss + row, mask=inside, other=0.0)
    for candidate in tl.range(1, candidates):
        other = tl.load(loss + candidate * stride + row, mask=inside, other=0.0)
        better = other < least
        best = tl.where(better, candidate, best)
        least = tl.where(better, other, least)
    tl.store(chosen + group * stride + row, best.to(tl.uint8), mask=inside)
    path = tl.load(ends + best * stride + row, mask=inside, other=0)
    for back in tl.range(0, count):
        k = count - 1 - back
        at = best * plane + k * stride + row
        word = tl.load(words + at, mask=inside, other=0)
        way = tl.load(ways + at, mask=inside, other=0)
        value = tl.load(
            found + (4 * best + path) * plane + k * stride + row, mask=inside, other=0.0
        )
        out = (start + k) * stride + row
        tl.store(codes + out, ((word >> 8 * path) & 0xFF).to(tl.uint8), mask=inside)
        tl.store(values + out, value, mask=inside)
        path = 2 * (path & 1) + ((way >> path) & 1)


@triton.jit(do_not_specialize=["rows", "columns", "start", "count"])
def push_kernel(
    target,  # float32 [columns, rows]
    weight,  # float32 [columns, rows]
    values,  # float32 [columns, rows]
    effects,  # float32 [columns, columns]
    rows,
    columns,
    start,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves targets after the columns [start, start + count) by the errors of these."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = start + count + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stride = rows.to(tl.int64)
    inside, there = row < rows, column < columns
    places = column[:, None] * stride + row[None, :]
    both = there[:, None] & inside[None, :]
    moved = tl.load(target + places, mask=both, other=0.0)
    for block in tl.range(0, count // BLOCK):
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
        for i in tl.range(0, BLOCK):
            j = start + block * BLOCK + i
            error = tl.load(weight + j * stride + row, mask=inside, other=0.0) - tl.load(
                values + j * stride + row, mask=inside, other=0.0
            )
            effect = tl.load(effects + j * columns.to(tl.int64) + column, mask=there, other=0.0)
            total += effect[:, None] * error[None, :]
        moved += total
    tl.store(target + places, moved, mask=both)
