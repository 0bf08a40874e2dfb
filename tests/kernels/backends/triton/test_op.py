"""On a GPU: the kernels as they are compiled, in a CUDA graph, and the scripts that time them."""

import pytest
import torch
from cost_model import LAYOUTS
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels import ops
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.repack import repack
from precalib_kernels.format import reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture(params=list(LAYOUTS))
def case(request, make_packed):
    packed = make_packed(LAYOUTS[request.param], 192, 576)
    tensors = {name: tensor.cuda() for name, tensor in packed.tensors.items()}
    arrays = repack(tensors, packed.layout, 576, [192])
    on_cpu = repack(packed.tensors, packed.layout, 576, [192])
    for name, array in arrays.items():  # a GPU divides by constants a little differently
        torch.testing.assert_close(array.cpu(), on_cpu[name], rtol=2**-10, atol=0)
    weight = reference.dequantize(tensors, packed.layout, 576)
    return packed.layout, [arrays[name] for name in ops.array_order(packed.layout)], weight.double()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 130, 300])
def test_product_is_the_reference(case, rows, dtype):
    layout, packed, weight = case
    x = torch.randn(rows, 576, device="cuda").to(dtype)
    y = op.gpu_linear(x, packed, None, [192], layout.to_text())
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    assert ((y.double() - exact).abs() <= 2**-7 * size).all()


@needs_gpu
@pytest.mark.gpu
def test_a_graph_replays_new_inputs(case):
    layout, packed, _ = case
    x = torch.randn(4, 576, device="cuda", dtype=torch.bfloat16)
    op.gpu_linear(x, packed, None, [192], layout.to_text())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.gpu_linear(x, packed, None, [192], layout.to_text())
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(y, op.gpu_linear(x, packed, None, [192], layout.to_text()))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["rtn-4", "paper-4"])
def test_vllms_kernel_with_salient_weights_is_the_reference(
    make_packed, monkeypatch, recipe, dtype
):
    stock = pytest.importorskip("vllm_precalib.mixed_precision_backend")
    from vllm.model_executor import parameter

    from precalib_kernels.backends.base import LinearSpec

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    packed = make_packed(RECIPE_LAYOUTS[recipe], 256, 576)
    tensors = {name: tensor.cuda() for name, tensor in packed.tensors.items()}
    spec = LinearSpec(packed.layout, 576, (256,), dtype, "cuda")
    if reason := stock.MixedPrecisionBackend.can_run(spec):
        pytest.skip(reason)
    backend, layer = stock.MixedPrecisionBackend(spec), torch.nn.Module()
    for name, tensor in backend.prepare(tensors, "fc").items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    backend.finish(layer)
    weight = reference.dequantize(tensors, packed.layout, 576).double()
    bias = torch.randn(256, device="cuda").to(dtype)
    for rows in (1, 3, 16, 33, 130):
        x = torch.randn(rows, 576, device="cuda").to(dtype)
        y = backend.apply(layer, x, bias)
        exact = x.double() @ weight.T + bias.double()
        size = x.double().abs() @ weight.T.abs() + bias.double().abs()
        assert ((y.double() - exact).abs() <= 2**-6 * size).all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            reread_register = backend.apply(layer, x, bias)
        graph.replay()
        assert torch.equal(reread_register, y)
