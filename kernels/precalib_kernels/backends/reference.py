"""Backend `reference`: plain torch on every device, and the operators over packed tensors."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout

CHUNK_WEIGHTS = 1 << 22  # weights unpacked at a time: their float32 and index form is large


class ReferenceBackend(Backend):
    """Unpacks the weight at every call: the memory of the file, and very slow."""

    name = "reference"
    experts = True

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.names = tuple(spec.layout.tensors(spec.output_size, spec.input_size))
        self.shard_sizes = list(spec.shard_sizes)
        self.layout_text = spec.layout.to_text()

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors as they are, once it is known that they can be unpacked."""
        for _ in unpacked_rows(tensors, self.spec, where):
            pass
        return dict(tensors)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::linear`."""
        packed: list[Tensor] = [layer.get_parameter(name) for name in self.names]
        return linear(x, packed, bias, self.shard_sizes, self.layout_text)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """One call of `precalib::gather_rows`."""
        packed: list[Tensor] = [layer.get_parameter(name) for name in self.names]
        return gather_rows(ids, packed, self.spec.input_size, self.layout_text, self.spec.dtype)


def linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    """`precalib::linear`: x·Ŵᵀ + bias in float32, rounded to the type of x; see `ops`."""
    result: Tensor = torch.ops.precalib.linear(x, packed, bias, shard_sizes, layout)
    return result


def dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    """`precalib::dequantize`: Ŵ [N, input_size] in `dtype`; see `ops`."""
    result: Tensor = torch.ops.precalib.dequantize(packed, input_size, shard_sizes, layout, dtype)
    return result


def gather_rows(
    ids: Tensor, packed: list[Tensor], input_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """`precalib::gather_rows`: rows of Ŵ by number, [..., input_size] in `dtype`; see `ops`."""
    result: Tensor = torch.ops.precalib.gather_rows(ids, packed, input_size, layout, dtype)
    return result


def unpacked_rows(
    tensors: Mapping[str, Tensor], spec: LinearSpec, where: str
) -> Iterator[tuple[slice, Tensor]]:
    """Ŵ in float32 a few rows at a time, which keeps the peak memory of unpacking low.

    tensors: as `Backend.prepare` gets them.

    Raises FormatError that begins with `where` for positions out of range.
    """
    step = max(1, CHUNK_WEIGHTS // spec.input_size)
    ends = itertools.accumulate(spec.shard_sizes, initial=0)
    for shard, (start, end) in enumerate(itertools.pairwise(ends)):
        for row in range(start, end, step):
            rows = slice(row, min(row + step, end))
            chunk = {name: tensor[rows] for name, tensor in tensors.items()}
            if spec.layout.column_scale:
                chunk["column_scale"] = tensors["column_scale"][shard : shard + 1]
            yield rows, reference.dequantize(chunk, spec.layout, spec.input_size, where=where)


def unpacked_weight(tensors: Mapping[str, Tensor], spec: LinearSpec, where: str) -> Tensor:
    """Ŵ [N, K] in the type of the activations; arguments and errors as of `unpacked_rows`."""
    shape = spec.output_size, spec.input_size
    weight = torch.empty(shape, dtype=spec.dtype, device=tensors["qweight"].device)
    for rows, values in unpacked_rows(tensors, spec, where):
        weight[rows] = values
    return weight


def _linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    parsed = Layout.from_text(layout)
    tensors = ops.named_tensors(packed, x.shape[-1], shard_sizes, parsed)
    return reference.linear(x, tensors, parsed, bias, shard_sizes)


torch.library.register_kernel("precalib::linear", None, _linear)


def _dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    parsed = Layout.from_text(layout)
    tensors = ops.named_tensors(packed, input_size, shard_sizes, parsed)
    weight = reference.dequantize(tensors, parsed, input_size, shard_sizes)
    return weight.to(dtype, copy=False).contiguous()


torch.library.register_kernel("precalib::dequantize", None, _dequantize)


def _gather_rows(
    ids: Tensor, packed: list[Tensor], input_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    parsed = Layout.from_text(layout)
    tensors = ops.named_tensors(packed, input_size, [packed[0].shape[0]], parsed)
    ops.check_ids(ids)
    rows = {
        name: tensor if name == "column_scale" else tensor[ids.flatten()]
        for name, tensor in tensors.items()
    }
    weight = reference.dequantize(rows, parsed, input_size)
    return weight.to(dtype).view(*ids.shape, input_size)


torch.library.register_kernel("precalib::gather_rows", None, _gather_rows)
