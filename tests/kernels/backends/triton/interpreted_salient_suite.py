"""Salient weights beside another kernel, run by `test_numerics.py` in a process of its own.

What a salient weight adds is kept in float16, off by 2**-11 of itself and in a row's smallest by
2**-27 of its largest; sums are float32, and the result is rounded once to its own type.
"""

import dataclasses
import itertools

import aot_compile
import pytest
import torch
import triton
from packed_tensors import RECIPE_LAYOUTS
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear.mixed_precision import triton_w4a16

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton import salient_op
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import Layout
from vllm_precalib import mixed_precision_backend

# Half a unit in the last place, or a whole one where the interpreter cuts bfloat16 off.
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
CUT = {torch.float16: 2**-11, torch.bfloat16: 2**-7}
PAPER, PLAIN = RECIPE_LAYOUTS["paper-4"], RECIPE_LAYOUTS["rtn-4"]
GRIDS = {
    "min-max": PAPER,
    "sign": Layout(4, 64, salient_count=3),
    "row": Layout(4, 32, scale="log8", salient_count=5, salient_grid="row"),
    "all": Layout(4, 32, salient_count=32),
}
SHAPES = itertools.product((1, 17, 96), (64, 96, 576), (1, 3, 16, 33))
CASES = [
    pytest.param(list(GRIDS)[i % 3], *shape, list(CUT)[i // 3 % 2], i // 6 % 2 == 0)
    for i, shape in enumerate(SHAPES)
]
CASES.append(pytest.param("all", 17, 96, 3, torch.bfloat16, True))


def parts_of(layout, tensors, columns, dtype):
    """Steps as another kernel has them, the base weights they make, and what salient ones add."""
    steps = (reference.group_scales(tensors, layout) / layout.codebook_limit).to(dtype)
    rounded = dataclasses.replace(layout, scale="float16", salient_count=0)
    scales = {"scales": steps.float() * layout.codebook_limit}
    base = reference.base_values({**tensors, **scales}, rounded, columns).double()
    weight = base.clone()
    if layout.salient_count:
        column, codes = reference.salient_codes(tensors, layout, columns, "")
        values = reference.salient_grid_values(codes, tensors, layout).double()
        weight = torch.nn.functional.pad(base, (0, 1)).scatter_(1, column, values)[:, :-1]
    return steps, base, weight - base


def slack(added, x):
    """By how much Σ added · x may be off."""
    stored = 2**-11 * added.abs() + 2**-27 * added.abs().amax(1, keepdim=True)
    return x.double().abs() @ (stored + added.shape[1] * 2**-24 * added.abs()).T


@pytest.mark.parametrize(("grid", "rows", "columns", "count", "dtype", "with_bias"), CASES)
def test_the_sum_is_the_reference(make_packed, grid, rows, columns, count, dtype, with_bias):
    layout = GRIDS[grid]
    tensors = make_packed(layout, rows, columns, seed=rows + columns).tensors
    steps, _, added = parts_of(layout, tensors, columns, dtype)
    arrays = salient_op.salient_arrays(tensors, steps, layout, columns).values()
    x, y = torch.randn(count, columns).to(dtype), torch.randn(count, rows).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    result = salient_op.gpu_sparse(y, x, *arrays, bias, layout.group_size)
    exact = y.double() + x.double() @ added.T + (0 if bias is None else bias.double())
    allowed = slack(added, x) + CUT[dtype] * exact.abs() + 2**-22
    assert result.dtype == dtype
    assert added.abs().amax() > 0.05
    worst = ((result.double() - exact).abs() / allowed).max().item()
    assert worst < 1, f"off by {worst} of the bound"


def test_no_salient_weights_leave_the_other_product(make_packed):
    tensors = make_packed(PAPER, 17, 160).tensors
    tensors["salient"].zero_()
    steps, _, added = parts_of(PAPER, tensors, 160, torch.float16)
    arrays = salient_op.salient_arrays(tensors, steps, PAPER, 160).values()
    x, y = torch.randn(3, 160).half(), torch.randn(3, 17).half()
    assert not added.any()
    assert torch.equal(salient_op.gpu_sparse(y, x, *arrays, None, 128), y)


def test_it_repeats_bit_for_bit_for_any_way_x_lies(make_packed):
    tensors = make_packed(PAPER, 17, 160).tensors
    steps, _, _ = parts_of(PAPER, tensors, 160, torch.float16)
    arrays = list(salient_op.salient_arrays(tensors, steps, PAPER, 160).values())
    wide, y = torch.randn(2, 1, 323).half(), torch.randn(2, 1, 17).half()
    x = wide[..., 1:321:2]
    result = salient_op.gpu_sparse(y, x, *arrays, None, 128)
    assert result.shape == (2, 1, 17)
    assert torch.equal(result, salient_op.gpu_sparse(y, x.contiguous(), *arrays, None, 128))
    one = salient_op.gpu_sparse(y[:1], x[:1], *arrays, None, 128)
    torch.testing.assert_close(one, result[:1], rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_is_one_for_torch(make_packed, with_bias):
    tensors = make_packed(PAPER, 17, 160).tensors
    steps, _, _ = parts_of(PAPER, tensors, 160, torch.float16)
    arrays = salient_op.salient_arrays(tensors, steps, PAPER, 160).values()
    bias = torch.randn(17).half() if with_bias else None
    given = torch.randn(3, 17).half(), torch.randn(3, 160).half(), *arrays, bias, 128
    torch.library.opcheck(torch.ops.precalib.gpu_sparse.default, given)


@pytest.fixture
def vllms_kernel(monkeypatch):
    """vLLM's Triton kernel is chosen, and runs in the interpreter."""
    path = triton_w4a16.__file__
    kernel = aot_compile.kernel_from(aot_compile.Path(path), "triton_w4a16_gemm_kernel")
    monkeypatch.setattr(triton_w4a16, "triton_w4a16_gemm_kernel", kernel)
    monkeypatch.setattr(triton_w4a16, "triton", triton)
    chosen = triton_w4a16.TritonW4A16LinearKernel
    monkeypatch.setattr(mixed_precision_backend, "choose_mp_linear_kernel", lambda _: chosen)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def in_torch(a, b_q, scales, qzeros, group_size, zp_bias):
    """What vLLM's kernel computes; the interpreter cannot multiply bfloat16."""
    codes, zeros = (
        unpack_bits(t.contiguous().view(torch.uint8), 4, 8 * t.shape[1]) for t in (b_q, qzeros)
    )
    zeros, scales = (t.repeat_interleave(group_size, 0) for t in (zeros, scales))
    weight = (codes.to(a.dtype) - zeros.to(a.dtype)) * scales
    return (a.float() @ weight.float()).to(a.dtype)


@pytest.mark.parametrize("dtype", list(CUT))
@pytest.mark.parametrize(
    ("layout", "columns", "parts", "count"),
    [
        (PLAIN, 256, (24,), 3),
        (PAPER, 256, (16, 8), 1),
        (PAPER, 576, (96,), 33),  # ragged
        (dataclasses.replace(PAPER, column_scale=True), 96, (16, 8), 3),
        (GRIDS["row"], 96, (24,), 3),
    ],
    ids=["plain", "paper", "ragged", "scaled", "row"],
)
def test_base_and_salient_weights_are_the_reference(
    vllms_kernel, monkeypatch, make_packed, layout, columns, parts, count, dtype
):
    if dtype == torch.bfloat16:
        monkeypatch.setattr(triton_w4a16, "triton_w4a16_gemm", in_torch)
    tensors = dict(make_packed(layout, sum(parts), columns).tensors)
    if layout.column_scale:
        tensors["column_scale"] = (torch.rand(len(parts), columns) + 0.5).half()
    backend = mixed_precision_backend.MixedPrecisionBackend(
        LinearSpec(layout, columns, parts, dtype, "cuda")
    )
    layer = torch.nn.Module()
    for name, tensor in backend.prepare(tensors, "fc").items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    x, bias = torch.randn(count, columns).to(dtype), torch.randn(sum(parts)).to(dtype)
    y = backend.apply(layer, x, bias)
    weight = reference.dequantize(tensors, layout, columns, parts).double()
    exact = x.double() @ weight.T + bias.double()
    _, base, added = parts_of(layout, tensors, columns, dtype)
    scale = torch.ones(1)
    if layout.column_scale:
        scale = reference.expand_shards(tensors["column_scale"].double(), parts)
    size = x.double().abs() @ (base * scale).abs().T
    # scales, and base weights in the kernel; its product; x after its column scale; the result
    allowed = (1.01 * ROUNDED[dtype] + 1.01 * CUT[dtype] + 2**-15) * size
    allowed += CUT[dtype] * (x.double() @ (base * scale).T).abs()
    if layout.column_scale:
        allowed += ROUNDED[dtype] * (size + x.double().abs() @ (added * scale).abs().T)
    allowed += slack(added * scale, x) + CUT[dtype] * exact.abs() + 2**-22
    worst = ((y.double() - exact).abs() / allowed).max().item()
    assert worst < 1, f"off by {worst} of the bound"
    assert worst > 2**-8  # it is a bound of what is rounded, not of anything


def test_the_layer_is_traced_whole(vllms_kernel, make_packed):
    tensors = make_packed(PAPER, 16, 160).tensors
    backend = mixed_precision_backend.MixedPrecisionBackend(
        LinearSpec(PAPER, 160, (16,), torch.float16, "cuda")
    )
    layer = torch.nn.Module()
    for name, tensor in backend.prepare(tensors, "fc").items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    traced = torch.compile(
        lambda x, b: backend.apply(layer, x, b), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for count in (2, 5):
        x, bias = torch.randn(count, 160).half(), torch.randn(16).half()
        assert torch.equal(traced(x, bias), backend.apply(layer, x, bias))
