"""What packed tensors mean, in plain torch: every backend is measured against this page."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import LOG_STEPS, LOG_ZERO, Layout
from precalib_kernels.format.salient_index import unpack_salient


def dequantize(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    input_size: int,
    shard_sizes: Sequence[int] | None = None,
    where: str = "packed weight",
) -> Tensor:
    """The weight Ŵ [N, K] in float32 that the packed tensors stand for.

    tensors:    as named by `Layout.tensors`.
    shard_sizes: output sizes of the matrices fused row-wise into this one (q, k, v for example);
                column_scale then has one row per shard.
    where:      begins the text of a FormatError about damaged positions.
    """
    weight = base_values(tensors, layout, input_size)
    if layout.salient_count:
        index, codes = salient_codes(tensors, layout, input_size, where)
        values = salient_grid_values(codes, tensors, layout)
        # unused slots point one past the end
        weight = torch.nn.functional.pad(weight, (0, 1)).scatter_(1, index, values)[:, :-1]
    if layout.column_scale:
        weight = weight * expand_shards(tensors["column_scale"].float(), shard_sizes)
    return weight


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """x·Ŵᵀ + bias, computed in float32 and returned in the type of x.

    x: [..., K];  bias: [N] or None;  returns [..., N].
    """
    weight = dequantize(tensors, layout, x.shape[-1], shard_sizes)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def base_values(tensors: Mapping[str, Tensor], layout: Layout, input_size: int) -> Tensor:
    """scale * (level - zero) / limit of every code of the base plane, float32 [N, K]."""
    codes = unpack_bits(tensors["qweight"], layout.bits, input_size)
    levels = torch.tensor(layout.codebook_values, dtype=torch.float32, device=codes.device)
    values = levels[codebook_index(codes, layout).int()]
    if layout.uniform:
        values -= expand_groups(tensors["zeros"].float(), layout, input_size)
    steps = group_scales(tensors, layout) / layout.codebook_limit
    return values * expand_groups(steps, layout, input_size)


def group_scales(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Scale of every group, float32 [N, G]."""
    if layout.scale == "float16":
        return tensors["scales"].float()
    steps = torch.arange(256, device=tensors["scales"].device, dtype=torch.float32)
    factors = torch.exp2(-steps / LOG_STEPS)
    factors[LOG_ZERO] = 0
    return tensors["row_scale"].float() * factors[tensors["scales"].int()]


def codebook_index(codes: Tensor, layout: Layout) -> Tensor:
    """Index of each weight's level: its code, or with a trellis 2 * (code ^ u2) + u1.

    codes:   uint8 [N, K] or grouped [..., group_size].
    returns: uint8 of the same shape.
    """
    if not layout.trellis:
        return codes
    columns = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -columns % layout.group_size))
    low = (padded & 1).view(*codes.shape[:-1], -1, layout.group_size)
    before = torch.nn.functional.pad(low, (2, 0))
    one, two = before[..., 1:-1], before[..., :-2]
    one, two = (part.flatten(-2)[..., :columns] for part in (one, two))
    return (codes ^ two) * 2 + one


def salient_codes(
    tensors: Mapping[str, Tensor], layout: Layout, input_size: int, where: str
) -> tuple[Tensor, Tensor]:
    """Column (int64) and code (uint8) of every salient slot, both [N, G*m].

    Unused slots have column K and a code that means nothing.
    """
    positions, high = unpack_salient(tensors["salient"], layout, input_size, where)
    start = torch.arange(positions.shape[1], device=positions.device) * layout.group_size
    column = torch.where(positions < 0, input_size, positions + start[:, None]).flatten(1)
    base = unpack_bits(tensors["qweight"], layout.bits, input_size)
    low = torch.nn.functional.pad(base, (0, 1)).gather(1, column)
    return column, low | high.flatten(1) << layout.bits


def salient_grid_values(codes: Tensor, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Value of each salient code on its row's grid, float32, codes being [N, any]."""
    if layout.salient_grid == "row":
        half = 1 << layout.salient_bits - 1
        return tensors["row_scale"].float() / (half - 1) * (codes.float() - half)
    scale, offset = tensors["salient_scale"].float(), tensors["salient_offset"].float()
    if layout.salient_grid == "min-max":
        return offset + scale * codes.float()
    top = 2 ** (layout.salient_bits - 1)
    magnitude = offset + scale * (codes % top).float()
    return torch.where(codes >= top, -magnitude, magnitude)


def expand_groups(per_group: Tensor, layout: Layout, input_size: int) -> Tensor:
    """[N, G] to [N, K], each group's value at all of its columns."""
    return per_group.repeat_interleave(layout.group_size, 1)[:, :input_size]


def expand_shards(per_shard: Tensor, shard_sizes: Sequence[int] | None) -> Tensor:
    """[parts, K] to [N, K] for fused matrices; [1, K] is returned as it is."""
    if per_shard.shape[0] == 1:
        return per_shard
    if shard_sizes is None or len(shard_sizes) != per_shard.shape[0]:
        raise FormatError(f"column_scale has {per_shard.shape[0]} rows for parts {shard_sizes}")
    sizes = torch.tensor(list(shard_sizes), device=per_shard.device)
    return per_shard.repeat_interleave(sizes, 0)
