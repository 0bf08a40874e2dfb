"""The operators of the `precalib::` namespace: schema, argument checks and fakes in one place.

| operator           | computes         | from                            | implemented in         |
|--------------------|------------------|---------------------------------|------------------------|
| linear             | x·Ŵᵀ + bias      | packed tensors of the file      | backends/reference.py  |
| dequantize         | Ŵ                | packed tensors of the file      | backends/reference.py  |
| gather_rows        | Ŵ[ids]           | packed tensors of the file      | backends/reference.py  |
| cpu_linear         | x·Ŵᵀ + bias      | bytes, x86/memory_layout.py     | x86/csrc (C++)         |
| cpu_gather_rows    | Ŵ[ids]           | bytes, x86/memory_layout.py     | x86/csrc (C++)         |
| gpu_linear         | x·Ŵᵀ + bias      | arrays, triton/memory_layout.py | triton/op.py           |
| gpu_grouped_linear | x·Ŵₑᵀ + biasₑ    | the same of all experts e       | triton/grouped_op.py   |
| gpu_gather_rows    | Ŵ[ids]           | arrays, triton/memory_layout.py | triton/gather_op.py    |
| gpu_dequantize     | Ŵ                | arrays, triton/memory_layout.py | triton/op.py           |
| gpu_sparse         | y + x·Sᵀ + bias  | arrays of salient weights S     | triton/salient_op.py   |

The calling convention is the same for all of them:

- `x` comes first where there is one: [..., K] in bfloat16, float16 or float32, which is also the
  type of the result [..., N]. So do the `ids` of rows, [...] int64. Then come the weight's tensors,
  the bias ([N], None for none), and what is constant for a layer.
- A weight of several tensors is a list in a fixed order: that of `Layout.tensors` for the tensors
  of the file, that of `array_order` for the arrays of a GPU. `column_scale` has a row per shard.
- `shard_sizes` are the rows of the matrices fused into the layer. `layout` is `Layout.to_text()`,
  so one schema serves every layout and torch.compile sees only tensors and constants.
- Nothing is changed in place. Arguments that do not belong together raise FormatError, in the fakes
  as well; `cpu_…` on real tensors are C++ and raise RuntimeError.

A backend implements an operator with `torch.library.register_kernel`, and its module offers the
operator as a typed function.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from precalib_kernels.backends.triton.memory_layout import padded, triton_layout
from precalib_kernels.backends.x86.memory_layout import X86LayoutStruct
from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import Layout

_Fake = TypeVar("_Fake", bound=Callable[..., Tensor])
ACTIVATION_TYPES = (torch.bfloat16, torch.float16, torch.float32)
X86_LAYOUT_BYTES = ctypes.sizeof(X86LayoutStruct)  # and 8 for each shard


def array_order(layout: Layout) -> list[str]:
    """Names of the arrays of a weight in GPU memory, in the order in which operators take them."""
    form = triton_layout(layout)
    names = ["qweight", "group_data", "row_unit", "tiles", "table", "constants"]
    if form.inline_salient:
        names.append("salient_affine")
    if form.slots:
        names += ["salient_positions", "salient_values", "salient_unit"]
    if layout.column_scale:
        names.append("column_scale")
    return names


def named_tensors(
    packed: Sequence[Tensor], input_size: int, shard_sizes: Sequence[int], layout: Layout
) -> dict[str, Tensor]:
    """The packed tensors of the file by name.

    packed: in the order of `Layout.tensors`.

    Raises FormatError for tensors of another number, shape or type, and for shards that are not
    all of the rows.
    """
    rows = packed[0].shape[0]
    specs = layout.tensors(rows, input_size)
    if sum(shard_sizes) != rows:
        raise FormatError(f"parts {list(shard_sizes)} do not add up to {rows} output rows")
    if len(packed) != len(specs):
        raise FormatError(f"{len(packed)} packed tensors, expected {list(specs)}")
    for (name, spec), tensor in zip(specs.items(), packed, strict=True):
        shape = (len(shard_sizes), input_size) if name == "column_scale" else spec.shape
        _check_tensor(name, tensor, shape, spec.dtype)
    return dict(zip(specs, packed, strict=True))


def named_arrays(
    packed: Sequence[Tensor],
    input_size: int,
    shard_sizes: Sequence[int],
    layout: Layout,
    experts: Sequence[int] = (),
) -> dict[str, Tensor]:
    """The arrays of a weight in GPU memory by name.

    packed:  in the order of `array_order`.
    experts: their number, where every array has one more dimension for them.

    Raises FormatError for another number of arrays, and for a `qweight` of another shape or type.
    """
    names = array_order(layout)
    if len(packed) != len(names):
        raise FormatError(f"{len(packed)} arrays of the in-memory form, expected {names}")
    form = triton_layout(layout)
    rows = sum(padded(size) for size in shard_sizes)
    shape = (*experts, form.steps(input_size), form.stored_tiles, rows, 16)
    _check_tensor("qweight", packed[0], shape, torch.int16)
    return dict(zip(names, packed, strict=True))


def check_sparse(
    y: Tensor, x: Tensor, positions: Tensor, values: Tensor, unit: Tensor, group_size: int
) -> None:
    """Check the arguments of `gpu_sparse` against each other.

    y: [..., N]; x: [..., K]; positions, values: [N, slots], a whole number of slots for each
    group; unit: [N].

    Raises FormatError.
    """
    outputs, groups = y.shape[-1], -(-x.shape[-1] // group_size)
    if y.shape[:-1] != x.shape[:-1] or y.dtype != x.dtype:
        raise FormatError(
            f"y is {list(y.shape)} {y.dtype}, expected {[*x.shape[:-1], outputs]} {x.dtype}"
        )
    slots = positions.shape[-1]
    if not slots or slots % groups:
        raise FormatError(f"{slots} slots are no whole number for each of {groups} groups")
    _check_tensor("salient_positions", positions, (outputs, slots), torch.uint8)
    _check_tensor("salient_values", values, (outputs, slots), torch.float16)
    _check_tensor("salient_unit", unit, (outputs,), torch.float32)


def empty_result(x: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """What x·Ŵᵀ + bias goes into: [..., outputs] of the type of x.

    Raises FormatError for a bias of another size.
    """
    if bias is not None and bias.shape != (outputs,):
        raise FormatError(f"bias has shape {list(bias.shape)}, expected [{outputs}]")
    return x.new_empty((*x.shape[:-1], outputs))


def check_ids(ids: Tensor) -> None:
    """Raise FormatError for numbers of rows that are not int64."""
    if ids.dtype != torch.int64:
        raise FormatError(f"ids are {ids.dtype}, expected torch.int64")


def _check_x86(packed: Tensor, x86_layout: Tensor) -> None:
    _check_tensor("packed", packed, (packed.numel(),), torch.uint8)
    _check_tensor("x86_layout", x86_layout, (x86_layout.numel(),), torch.uint8)
    if x86_layout.numel() <= X86_LAYOUT_BYTES:
        raise FormatError(
            f"'x86_layout' has {x86_layout.numel()} bytes, expected more than {X86_LAYOUT_BYTES}"
        )


def _check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise FormatError(
            f"'{name}' is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        )


def _operator(name: str, arguments: str) -> Callable[[_Fake], _Fake]:
    """Declare `precalib::name`, whose fake, with all checks of shapes, is what this decorates."""

    def declare(fake: _Fake) -> _Fake:
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(f"precalib::{name}", f"({arguments}) -> Tensor", tags=tags)
        torch.library.register_fake(f"precalib::{name}", fake)
        return fake

    return declare


@_operator(
    "linear",
    "Tensor x, Tensor[] packed, Tensor? bias, SymInt[] shard_sizes, str layout",
)
def _linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    named_tensors(packed, x.shape[-1], shard_sizes, Layout.from_text(layout))
    return empty_result(x, bias, packed[0].shape[0])


@_operator(
    "dequantize",
    "Tensor[] packed, SymInt input_size, SymInt[] shard_sizes, str layout, ScalarType dtype",
)
def _dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    named_tensors(packed, input_size, shard_sizes, Layout.from_text(layout))
    return packed[0].new_empty((packed[0].shape[0], input_size), dtype=dtype)


@_operator(
    "gather_rows",
    "Tensor ids, Tensor[] packed, SymInt input_size, str layout, ScalarType dtype",
)
def _gather_rows(
    ids: Tensor, packed: list[Tensor], input_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    named_tensors(packed, input_size, [packed[0].shape[0]], Layout.from_text(layout))
    check_ids(ids)
    return ids.new_empty((*ids.shape, input_size), dtype=dtype)


@_operator(
    "cpu_gather_rows",
    "Tensor ids, Tensor packed, Tensor x86_layout, int outputs, int dtype, int columns",
)
def _cpu_gather_rows(
    ids: Tensor, packed: Tensor, x86_layout: Tensor, outputs: int, dtype: int, columns: int
) -> Tensor:
    """dtype: index into `x86.library.DTYPES`."""
    del outputs
    check_ids(ids)
    _check_x86(packed, x86_layout)
    kind = (torch.float32, torch.bfloat16, torch.float16)[dtype]
    return ids.new_empty((*ids.shape, columns), dtype=kind)


@_operator(
    "cpu_linear",
    "Tensor x, Tensor packed, Tensor x86_layout, Tensor? bias, int outputs, int isa",
)
def _cpu_linear(
    x: Tensor, packed: Tensor, x86_layout: Tensor, bias: Tensor | None, outputs: int, isa: int
) -> Tensor:
    """All checks that need no look into `x86_layout`, whose bytes a fake does not have."""
    del isa
    if not x.dim() or x.dtype not in ACTIVATION_TYPES:
        raise FormatError(
            f"x is {list(x.shape)} {x.dtype}, expected [..., K] bfloat16, float16 or float32"
        )
    _check_x86(packed, x86_layout)
    if bias is not None and bias.dtype != x.dtype:
        raise FormatError(f"bias is {bias.dtype}, expected {x.dtype}")
    return empty_result(x, bias, outputs)


@_operator(
    "gpu_linear",
    "Tensor x, Tensor[] packed, Tensor? bias, SymInt[] shard_sizes, str layout",
)
def _gpu_linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, shard_sizes: list[int], layout: str
) -> Tensor:
    named_arrays(packed, x.shape[-1], shard_sizes, Layout.from_text(layout))
    return empty_result(x, bias, sum(shard_sizes))


@_operator(
    "gpu_grouped_linear",
    "Tensor x, Tensor[] packed, Tensor? bias, Tensor routes, Tensor expert_ids, Tensor used, "
    "Tensor? factors, SymInt top_k, int block, bool complete, SymInt[] shard_sizes, str layout",
)
def _gpu_grouped_linear(
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    routes: Tensor,
    expert_ids: Tensor,
    used: Tensor,
    factors: Tensor | None,
    top_k: int,
    block: int,
    complete: bool,
    shard_sizes: list[int],
    layout: str,
) -> Tensor:
    del complete, block
    experts, outputs, count = packed[0].shape[0], sum(shard_sizes), x.shape[0] * top_k
    named_arrays(packed, x.shape[-1], shard_sizes, Layout.from_text(layout), (experts,))
    if bias is not None and bias.shape != (experts, outputs):
        raise FormatError(f"bias has shape {list(bias.shape)}, expected [{experts}, {outputs}]")
    if factors is not None:
        _check_tensor("factors", factors, (count,), torch.float32)
    for name, tensor in (("routes", routes), ("expert_ids", expert_ids), ("used", used)):
        _check_tensor(name, tensor, (tensor.numel(),), torch.int32)
    if count * outputs >= 2**31:
        raise FormatError(f"{count} routes are too many at a time for {outputs} outputs")
    return x.new_empty((count, outputs))


@_operator(
    "gpu_gather_rows",
    "Tensor ids, Tensor[] packed, SymInt input_size, SymInt outputs, str layout, ScalarType dtype",
)
def _gpu_gather_rows(
    ids: Tensor, packed: list[Tensor], input_size: int, outputs: int, layout: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    named_arrays(packed, input_size, [outputs], Layout.from_text(layout))
    check_ids(ids)
    return ids.new_empty((*ids.shape, input_size), dtype=dtype)


@_operator(
    "gpu_dequantize",
    "Tensor[] packed, SymInt input_size, SymInt[] shard_sizes, str layout, ScalarType dtype",
)
def _gpu_dequantize(
    packed: list[Tensor], input_size: int, shard_sizes: list[int], layout: str, dtype: torch.dtype
) -> Tensor:
    named_arrays(packed, input_size, shard_sizes, Layout.from_text(layout))
    return packed[0].new_empty((sum(shard_sizes), input_size), dtype=dtype)


@_operator(
    "gpu_sparse",
    "Tensor y, Tensor x, Tensor positions, Tensor values, Tensor unit, "
    "Tensor? bias, SymInt group_size",
)
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
    return empty_result(x, bias, y.shape[-1])
