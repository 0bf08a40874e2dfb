"""What packed tensors mean, in plain torch: every backend is measured against this page."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError
from precalib_kernels.layout import LOG_STEPS, LOG_ZERO, Layout, unpack_bits
from precalib_kernels.positions import unpack_positions


def dequantize(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    input_size: int,
    part_sizes: Sequence[int] | None = None,
    where: str = "packed weight",
) -> Tensor:
    """The weight Ŵ [N, K] in float32 that the packed tensors stand for.

    tensors:    as named by `Layout.tensors`.
    part_sizes: output sizes of the matrices fused row-wise into this one (q, k, v for example);
                column_scale then has one row per part.
    where:      begins the text of a FormatError about damaged positions.
    """
    weight = base_values(tensors, layout, input_size)
    if layout.salient_count:
        index = salient_index(tensors["salient_positions"], layout, input_size, where)
        values = salient_values(tensors, layout, input_size, index)
        # unused slots point one past the end
        weight = torch.nn.functional.pad(weight, (0, 1)).scatter_(1, index, values)[:, :-1]
    if layout.column_scale:
        weight = weight * expand_parts(tensors["column_scale"].float(), part_sizes)
    return weight


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Tensor | None = None,
    part_sizes: Sequence[int] | None = None,
) -> Tensor:
    """x·Ŵᵀ + bias, computed in float32 and returned in the type of x.

    x: [..., K];  bias: [N] or None;  returns [..., N].
    """
    weight = dequantize(tensors, layout, x.shape[-1], part_sizes)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def base_values(tensors: Mapping[str, Tensor], layout: Layout, input_size: int) -> Tensor:
    """scale * (level - zero) / limit of every code of the base plane, float32 [N, K]."""
    codes = unpack_bits(tensors["qweight"], layout.bits, input_size)
    levels = torch.tensor(layout.level_values, dtype=torch.float32, device=codes.device)
    values = levels[codes.int()]
    if layout.uniform:
        values -= expand_groups(tensors["zeros"].float(), layout, input_size)
    steps = group_scales(tensors, layout) / layout.level_limit
    return values * expand_groups(steps, layout, input_size)


def group_scales(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Scale of every group, float32 [N, G]."""
    if layout.scale == "float16":
        return tensors["scales"].float()
    steps = torch.arange(256, device=tensors["scales"].device, dtype=torch.float32)
    factors = torch.exp2(-steps / LOG_STEPS)
    factors[LOG_ZERO] = 0
    return tensors["row_scale"].float() * factors[tensors["scales"].int()]


def salient_index(packed: Tensor, layout: Layout, input_size: int, where: str) -> Tensor:
    """Column of every salient slot, int64 [N, G*m]; unused slots hold K."""
    index = unpack_positions(packed, layout, input_size, where).long()
    start = torch.arange(index.shape[1], device=index.device) * layout.group_size
    return torch.where(index < 0, input_size, index + start[:, None]).flatten(1)


def salient_values(
    tensors: Mapping[str, Tensor], layout: Layout, input_size: int, index: Tensor
) -> Tensor:
    """Value of every salient slot before the column scale, float32 [N, G*m].

    index: as `salient_index` returns it; values of unused slots mean nothing.
    """
    rows, groups = index.shape[0], layout.groups(input_size)
    base = unpack_bits(tensors["qweight"], layout.bits, input_size)
    codes = torch.nn.functional.pad(base, (0, 1)).gather(1, index)
    if layout.salient_code_bytes:
        packed = tensors["salient_codes"].view(rows, groups, layout.salient_code_bytes)
        high = unpack_bits(packed, layout.salient_bits - layout.bits, layout.salient_count)
        codes = codes | high.flatten(1) << layout.bits
    return salient_grid_values(codes, tensors, layout)


def salient_grid_values(codes: Tensor, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Value of each salient code on its row's grid, float32, codes being [N, any]."""
    if layout.salient_grid == "row":
        return tensors["row_scale"].float() / 127 * (codes.float() - 128)
    scale, offset = tensors["salient_scale"].float(), tensors["salient_offset"].float()
    if layout.salient_grid == "min-max":
        return offset + scale * codes.float()
    top = 2 ** (layout.salient_bits - 1)
    magnitude = offset + scale * (codes % top).float()
    return torch.where(codes >= top, -magnitude, magnitude)


def expand_groups(per_group: Tensor, layout: Layout, input_size: int) -> Tensor:
    """[N, G] to [N, K], each group's value at all of its columns."""
    return per_group.repeat_interleave(layout.group_size, 1)[:, :input_size]


def expand_parts(per_part: Tensor, part_sizes: Sequence[int] | None) -> Tensor:
    """[parts, K] to [N, K] for fused matrices; [1, K] is returned as it is."""
    if per_part.shape[0] == 1:
        return per_part
    if part_sizes is None or len(part_sizes) != per_part.shape[0]:
        raise FormatError(f"column_scale has {per_part.shape[0]} rows for parts {part_sizes}")
    sizes = torch.tensor(list(part_sizes), device=per_part.device)
    return per_part.repeat_interleave(sizes, 0)
