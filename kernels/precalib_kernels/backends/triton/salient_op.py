"""`precalib::gpu_sparse`: salient weights added to what a plain 4-bit kernel computes.

A salient weight is kept as what it adds to the base weight in its place: an 8-bit position in its
group and a float16 difference in units of its row. Every group has m slots, used or not (position
and difference 0), so that is 24·m/g bits per weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from precalib_kernels.backends.triton.launch_configs import (
    SPARSE_TABLE,
    SparseBlocks,
    sparse_blocks,
)
from precalib_kernels.backends.triton.repack import CHUNK_WEIGHTS, salient_slots
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import Layout
from precalib_kernels.ops import check_sparse, empty_result

NAMES = ("salient_positions", "salient_values", "salient_unit")


def salient_arrays(
    tensors: Mapping[str, Tensor],
    steps: Tensor,
    layout: Layout,
    input_size: int,
    where: str = "packed weight",
) -> dict[str, Tensor]:
    """The arrays `NAMES` of salient weights over base weights (code - zero) · step.

    tensors: as named by `Layout.tensors`, uniform levels; column_scale is not looked at.
    steps:   [N, G] in the type in which the other kernel has them, so that its rounding of a step
             does not reach salient weights.
    returns: uint8 and float16 [N, G·m], float32 [N]; slots of a group lie side by side.

    Raises FormatError that begins with `where` for positions out of range.
    """
    pieces = []
    chunk = max(1, CHUNK_WEIGHTS // input_size)
    for row in range(0, len(steps), chunk):
        taken = slice(row, row + chunk)
        piece = {name: t[taken] for name, t in tensors.items() if name != "column_scale"}
        codes = unpack_bits(piece["qweight"], layout.bits, input_size).float()
        zeros = reference.expand_groups(piece["zeros"].float(), layout, input_size)
        base = (codes - zeros) * reference.expand_groups(steps[taken].float(), layout, input_size)
        positions, values, unit = salient_slots(piece, base, layout, input_size, where)
        pieces.append((positions.flatten(1), values.flatten(1), unit))
    return {name: torch.cat(parts) for name, *parts in zip(NAMES, *pieces, strict=True)}


def gpu_sparse(
    y: Tensor,
    x: Tensor,
    positions: Tensor,
    values: Tensor,
    unit: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """`precalib::gpu_sparse`: y + x·(what salient weights add)ᵀ + bias; see `ops`.

    It is summed in float32 and rounded once to the type of y.
    y: [..., N];  x: [..., K];  positions, values, unit: see `salient_arrays`;  bias: [N] or None.
    """
    result: Tensor = torch.ops.precalib.gpu_sparse(y, x, positions, values, unit, bias, group_size)
    return result


def _gpu_sparse(
    y: Tensor,
    x: Tensor,
    positions: Tensor,
    values: Tensor,
    unit: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    check_sparse(y, x, positions, values, unit, group_size)
    from precalib_kernels.backends.triton.salient_kernel import sparse_kernel

    out = empty_result(x, bias, y.shape[-1])
    flat, y = x.reshape(-1, x.shape[-1]), y.contiguous()
    rows, columns = flat.shape
    outputs, slots = positions.shape
    blocks = sparse_blocks(rows)
    if rows:
        sparse_kernel[(-(-outputs // blocks.block_n), -(-rows // blocks.block_m))](
            out, y, by_column(flat, blocks), y if bias is None else bias, positions, values, unit,
            rows, outputs, columns, slots, GROUP=group_size,
            COUNT=slots // -(-columns // group_size), **specialization(blocks, bias is not None),
            num_warps=blocks.warps,
        )  # fmt: skip
    return out


torch.library.register_kernel("precalib::gpu_sparse", None, _gpu_sparse)


def by_column(x: Tensor, blocks: SparseBlocks) -> Tensor:
    """X [M, K] as [blocks, K, block_m], rows past the last being zeros; one row stays as it is."""
    missing = -x.shape[0] % blocks.block_m
    filled = pad(x, (0, 0, 0, missing)) if missing else x
    turned = filled.reshape(-1, blocks.block_m, x.shape[1]).transpose(1, 2).contiguous()
    # A kernel is compiled for addresses it has seen; let no odd one come while serving.
    return turned.clone() if turned.data_ptr() % 16 else turned


def specialization(blocks: SparseBlocks, bias: bool) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel, less those of the layout."""
    return {
        "BIAS": bias,
        "BLOCK_N": blocks.block_n,
        "BLOCK_M": blocks.block_m,
        "BLOCK_S": blocks.slots,
    }


def warm_up_rows() -> list[int]:
    """Values of M that reach every kernel."""
    return [blocks.block_m for blocks in SPARSE_TABLE]
