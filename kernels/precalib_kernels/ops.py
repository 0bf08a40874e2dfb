"""The operators of the `precalib::` namespace: schema, checks and fakes in one place.

Packed tensors travel as a list in the order of `Layout.tensors`, the layout as its one-line text,
so one schema serves every layout and torch.compile sees only tensors and constants.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout


def packed_list(tensors: Mapping[str, Tensor], layout: Layout, input_size: int) -> list[Tensor]:
    """The packed tensors in the order in which the operators take them."""
    rows = tensors["qweight"].shape[0]
    return [tensors[name] for name in layout.tensors(rows, input_size)]


@torch.library.custom_op("precalib::dequantize", mutates_args=())
def dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    """Ŵ [N, input_size] in `dtype`; see `reference.dequantize`."""
    parsed = Layout.from_text(layout)
    tensors = _named(packed, input_size, shard_sizes, parsed)
    weight = reference.dequantize(tensors, parsed, input_size, shard_sizes)
    return weight.to(dtype, copy=False).contiguous()


@dequantize.register_fake
def _(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    _named(packed, input_size, shard_sizes, Layout.from_text(layout))
    return packed[0].new_empty((packed[0].shape[0], input_size), dtype=dtype)


@torch.library.custom_op("precalib::linear", mutates_args=())
def linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    """x·Ŵᵀ + bias straight from the packed tensors, by the reference on every device.

    x: [..., K] in bfloat16, float16 or float32, which is also the type of the result [..., N].
    """
    parsed = Layout.from_text(layout)
    tensors = _named(packed, x.shape[-1], shard_sizes, parsed)
    return reference.linear(x, tensors, parsed, bias, shard_sizes)


@linear.register_fake
def _(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    _named(packed, int(x.shape[-1]), shard_sizes, Layout.from_text(layout))
    return empty_result(x, bias, packed[0].shape[0])


def empty_result(x: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """What x·Ŵᵀ + bias goes into: [..., rows]. Raises FormatError for a bias of another size."""
    if bias is not None and bias.shape != (rows,):
        raise FormatError(f"bias has shape {list(bias.shape)}, expected [{rows}]")
    return x.new_empty((*x.shape[:-1], rows))


def _named(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: Layout
) -> dict[str, Tensor]:
    rows = packed[0].shape[0]
    specs = layout.tensors(rows, input_size)
    if sum(shard_sizes) != rows:
        raise FormatError(f"parts {shard_sizes} do not add up to {rows} output rows")
    if len(packed) != len(specs):
        raise FormatError(f"{len(packed)} packed tensors, expected {list(specs)}")
    for (name, spec), tensor in zip(specs.items(), packed, strict=True):
        shape = (len(shard_sizes), input_size) if name == "column_scale" else spec.shape
        if tuple(tensor.shape) != shape or tensor.dtype != spec.dtype:
            raise FormatError(
                f"'{name}' is {list(tensor.shape)} {tensor.dtype}, "
                f"expected {list(shape)} {spec.dtype}"
            )
    return dict(zip(specs, packed, strict=True))
