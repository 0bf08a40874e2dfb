"""`precalib::gpu_linear` and `precalib::gpu_dequantize`: typed functions and the implementation."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from precalib_kernels.backends.routes import Grouping
from precalib_kernels.backends.triton import decode_ptx
from precalib_kernels.backends.triton.kernel_arguments import (
    array_arguments,
    prepare_blocks,
    routing_arguments,
)
from precalib_kernels.backends.triton.launch_configs import (
    TABLE,
    Blocks,
    blocks_for,
    family_of,
    splits,
)
from precalib_kernels.backends.triton.memory_layout import ROWS, TritonLayout, padded, triton_layout
from precalib_kernels.format.layout import Layout
from precalib_kernels.ops import named_arrays

PREPARE_WARPS = 8
DEQUANTIZE_WARPS = 2
PANEL_WEIGHTS = 1 << 25  # dequantized at a time for a plain product: 64 MiB of bfloat16


def gpu_linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    """`precalib::gpu_linear`: x·Ŵᵀ + bias, [..., K] to [..., N] in the type of x; see `ops`.

    packed: as `repack` gives them, in the order of `array_order`.
    """
    result: Tensor = torch.ops.precalib.gpu_linear(x, packed, bias, shard_sizes, layout)
    return result


def gpu_dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    """`precalib::gpu_dequantize`: Ŵ [N, input_size] in `dtype`; see `ops`."""
    result: Tensor = torch.ops.precalib.gpu_dequantize(
        packed, input_size, shard_sizes, layout, dtype
    )
    return result


def _gpu_linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    parsed = Layout.from_text(layout)
    arrays = named_arrays(packed, x.shape[-1], shard_sizes, parsed)
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], sum(shard_sizes)))
    blocks = blocks_for(family(), flat.shape[0], triton_layout(parsed).step)
    if blocks is None:
        y = by_panels(flat, arrays, bias, parsed, shard_sizes)
    else:
        y = gemm(flat, arrays, bias, parsed, shard_sizes, blocks)
    return y.view(*x.shape[:-1], y.shape[-1])


# for every device: under Triton's interpreter kernels run on the CPU
torch.library.register_kernel("precalib::gpu_linear", None, _gpu_linear)


def _gpu_dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    parsed = Layout.from_text(layout)
    arrays = named_arrays(packed, input_size, shard_sizes, parsed)
    weight = packed[0].new_empty((sum(shard_sizes), input_size), dtype=dtype)
    panel(weight, arrays, parsed, 0, packed[0].shape[2] // ROWS)
    return weight


torch.library.register_kernel("precalib::gpu_dequantize", None, _gpu_dequantize)


def gemm(
    x: Tensor,
    arrays: Mapping[str, Tensor],
    bias: Tensor | None,
    layout: Layout,
    shard_sizes: Sequence[int],
    blocks: Blocks,
    grouping: Grouping | None = None,
) -> Tensor:
    """x [M, K] times Ŵᵀ by the fused kernel, cut up as `blocks` says.

    grouping: which expert computes which rows; arrays and bias are then those of all experts.
    """
    from precalib_kernels.backends.triton.activation_kernel import prepare_kernel
    from precalib_kernels.backends.triton.gemm_kernel import gemm_kernel

    form = triton_layout(layout)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (rows, columns), device = x.shape, x.device
    steps, _, padded_rows, _ = arrays["qweight"].shape[-4:]
    whole, parts = steps * form.step, len(shard_sizes)  # columns of whole steps
    fits = all(padded(size) % blocks.block_n == 0 for size in shard_sizes)
    block_n = blocks.block_n if fits else ROWS  # a program stays within one part
    row_blocks = -(-rows // blocks.block_m)
    if grouping is not None:
        rows, row_blocks = rows * grouping.top_k, grouping.routes.expert_ids.numel()
    routing = routing_arguments(grouping, x)
    tiles = padded_rows // block_n
    split_count = splits(blocks, tiles, row_blocks, steps, processors(device))

    plane = (parts, row_blocks)
    half = functools.partial(torch.empty, dtype=torch.float16, device=device)
    single = functools.partial(torch.empty, dtype=torch.float32, device=device)
    dots = half((*plane, whole, blocks.block_m))
    gathered = form.gathered_columns(columns)
    by_column = half((*plane, gathered, blocks.block_m)) if form.slots else dots
    offset_terms, group_sums = single((2, *plane, whole // form.group, blocks.block_m))
    x_scale = single((*plane, blocks.block_m))
    partial_sums = (
        single((split_count, row_blocks, padded_rows, blocks.block_m))
        if split_count > 1
        else x_scale
    )
    counters = torch.empty(row_blocks * tiles, dtype=torch.int32, device=device)
    new = x.new_empty if grouping is None or grouping.complete else x.new_zeros
    y = new((rows, sum(shard_sizes)))
    grouped = grouping is not None

    block_k, row_block = prepare_blocks(blocks.block_m, whole)
    prepare_kernel[(row_blocks * blocks.block_m, parts, -(-max(whole, gathered) // block_k))](
        x, arrays.get("column_scale", x), dots, by_column, offset_terms, group_sums, x_scale,
        counters, routing["routes"], routing["expert_ids"], routing["used"],
        counters.numel() if split_count > 1 else 0, rows, columns, whole, gathered, x.stride(0),
        grouping.top_k if grouping else 1,
        OFFSET=form.offset, ENTRIES_PER_UNIT=form.entries_per_unit, GROUP=form.group,
        MODE=form.mode, J=form.chain_tiles, SCALED=layout.column_scale, BY_COLUMN=form.slots > 0,
        BLOCK_M=blocks.block_m, BLOCK_K=block_k, ROW_BLOCK=row_block, GROUPED=grouped,
        num_warps=PREPARE_WARPS,
    )  # fmt: skip
    gemm_kernel[(tiles, split_count, row_blocks)](
        y, x if bias is None else bias, **array_arguments(arrays),
        dots=dots, by_column=by_column, offset_terms=offset_terms, group_sums=group_sums,
        x_scale=x_scale, partial_sums=partial_sums, counters=counters, **routing, rows=rows,
        outputs=y.shape[1], padded_rows=padded_rows, steps=steps, GROUPED=grouped,
        WEIGHTED=grouping is not None and grouping.factors is not None, BIAS=bias is not None,
        SPLIT=split_count > 1, BLOCK_N=block_n, BLOCK_M=blocks.block_m, STAGES=blocks.stages,
        **blocks.options, **specialization(form),
    )  # fmt: skip
    return y


def panel(
    weight: Tensor,
    arrays: Mapping[str, Tensor],
    layout: Layout,
    first: int,
    last: int,
    in_dots: bool = False,
) -> None:
    """Write the rows of tiles first … last - 1 of Ŵ into `weight` [rows, K].

    in_dots: columns in the order of the dots, K being whole steps.
    """
    from precalib_kernels.backends.triton.dequantize_kernel import dequantize_kernel

    form = triton_layout(layout)
    steps, _, padded_rows, _ = arrays["qweight"].shape
    dequantize_kernel[(last - first, steps)](
        weight, **array_arguments(arrays), column_scale=arrays.get("column_scale", weight),
        first_tile=first, columns=weight.shape[1], padded_rows=padded_rows,
        SCALED=layout.column_scale, ENTRIES_PER_UNIT=form.entries_per_unit, IN_DOTS=in_dots,
        num_warps=DEQUANTIZE_WARPS, **specialization(form),
    )  # fmt: skip


def by_panels(
    x: Tensor,
    arrays: Mapping[str, Tensor],
    bias: Tensor | None,
    layout: Layout,
    shard_sizes: Sequence[int],
) -> Tensor:
    """x·Ŵᵀ by the vendor's product, a bounded number of dequantized rows at a time."""
    form, device = triton_layout(layout), x.device
    in_dots, columns = form.mode == "trellis", x.shape[1]
    if in_dots:  # columns of a trellis are far apart in memory, so x is reordered instead
        columns = form.steps(columns) * form.step
        x = pad(x, (0, columns - x.shape[1])).index_select(1, dot_order(form, columns, device))
    most = max(1, PANEL_WEIGHTS // columns // ROWS)  # tiles of a panel
    ends, tile = [], 0
    for size in shard_sizes:
        count = padded(size) // ROWS
        for first in range(0, count, most):
            last = min(first + most, count)
            ends.append((tile + first, tile + last, min(last * ROWS, size) - first * ROWS))
        tile += count
    results, row = [], 0
    for first, last, rows in ends:
        weight = x.new_empty((rows, columns))
        panel(weight, arrays, layout, first, last, in_dots)
        part_bias = None if bias is None else bias[row : row + rows]
        results.append(torch.nn.functional.linear(x, weight, part_bias))
        row += rows
    return results[0] if len(results) == 1 else torch.cat(results, 1)


@functools.lru_cache(maxsize=64)
def dot_order(form: TritonLayout, columns: int, device: torch.device) -> Tensor:
    """Column of every place in the order of the dots of a trellis, int64 [columns]."""
    from precalib_kernels.backends.triton.dequantize_kernel import dot_column

    place = torch.arange(columns, device=device)
    order: Tensor = dot_column.fn(place // 16, place % 16, form.group, form.mode, form.chain_tiles)
    return order


def warm_up_rows() -> list[int]:
    """Values of M that reach every kernel: one for each number of blocks, and one for panels."""
    rows: list[int] = []
    least = 1
    for most, blocks in TABLE[family()].items():
        rows += range(least, most + 1, blocks.block_m)
        least = most + 1
    return [*rows, least]


@functools.lru_cache(maxsize=64)
def specialization(form: TritonLayout, assembler: bool | None = None) -> dict[str, Any]:
    """Compile-time arguments of both kernels that decode words."""
    use = family() != "hip" and not interpreted() if assembler is None else assembler
    return {
        "BITS": form.bits,
        "MODE": form.mode,
        "INLINE": form.inline_salient,
        "GROUP": form.group,
        "STEP": form.step,
        "TILES": form.stored_tiles,
        "J": form.chain_tiles,
        "OFFSET": form.offset,
        "ZEROS": form.zero_points,
        "SLOTS": form.slots,
        "LOG8": form.log8,
        "ASM": decode_ptx.assembler(form) if use else "",
        "REGISTERS": decode_ptx.constraints(form) if use else "",
        "SPARE": decode_ptx.spare_assembler(form.bits) if use and form.bits < 4 else "",
    }


@functools.lru_cache(maxsize=1)
def family() -> str:
    """The row of `TABLE` for this machine's GPU."""
    if torch.version.hip:
        return "hip"
    if not torch.cuda.is_available():
        return "cuda"
    return family_of("sm_{}{}".format(*torch.cuda.get_device_capability()))


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which has no assembler."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where there is none, under the interpreter."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
