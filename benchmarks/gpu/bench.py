"""Times of the GPU kernels on a machine that has a GPU: `python benchmarks/gpu/bench.py`.

Every candidate of a shape is timed in the same run, in interleaved rounds inside a CUDA graph, and
the median is given as a ratio to bfloat16's plain product.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cost_model import LAYOUTS, SHAPES
from torch import Tensor

from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.repack import repack
from precalib_kernels.format.layout import Layout

ROUNDS = 7
CALLS = 20  # of one candidate in a graph


def random_packed(layout: Layout, rows: int, columns: int, device: str) -> list[Tensor]:
    """Arrays of a weight with random codes, no salient weight used: their cost is the same."""
    tensors = {}
    for name, (shape, dtype) in layout.tensors(rows, columns).items():
        if dtype == torch.uint8:
            high = 1 if name == "salient" else 2**layout.bits if name == "zeros" else 256
            tensors[name] = torch.randint(0, high, shape, dtype=dtype, device=device)
        else:
            tensors[name] = (torch.rand(shape, device=device) + 0.1).to(dtype)
    arrays = repack(tensors, layout, columns, [rows])
    return [arrays[name] for name in op.array_order(layout)]


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """`call`, CALLS times, as one CUDA graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of one call of each."""
    graphs = {name: captured(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, replay in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


@contextlib.contextmanager
def alone_in_vllm() -> Iterator[None]:
    """vLLM's state of a single process, which its parameters ask for; nothing without vLLM."""
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
    except ImportError:
        yield
        return
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as directory:
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
            initialize_model_parallel()
        yield


def vllm_kernels(rows: int, columns: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """vLLM's W4A16 products of a random weight: its own choice for this GPU, and its Triton one.

    Nothing where vLLM is not installed.
    """
    try:
        from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
        from vllm.model_executor.kernels.linear.mixed_precision import triton_w4a16
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
            MPLinearLayerConfig,
        )
        from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
        from vllm.scalar_type import scalar_types
    except ImportError:
        return
    config = MPLinearLayerConfig(
        (columns, rows), (columns, rows), scalar_types.uint4b8, torch.bfloat16, 128, False
    )
    words = torch.randint(
        -(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, device="cuda"
    )
    scales = torch.rand(rows, columns // 128, dtype=torch.bfloat16, device="cuda")
    for kind in (choose_mp_linear_kernel(config), triton_w4a16.TritonW4A16LinearKernel):
        layer = torch.nn.Module()

        def ignore(*_: Any) -> None:
            return None

        layer.weight_packed = PackedvLLMParameter(
            data=words.clone(), input_dim=1, output_dim=0, packed_dim=1, packed_factor=8,
            weight_loader=ignore,
        )  # fmt: skip
        layer.weight_scale = GroupQuantScaleParameter(
            data=scales.clone(), input_dim=1, output_dim=0, weight_loader=ignore
        )
        kernel = kind(config, "weight_packed", "weight_scale")
        kernel.process_weights_after_loading(layer)
        name = kind.__name__.removesuffix("LinearKernel")
        yield f"vLLM {name}", functools.partial(kernel.apply_weights, layer)


def compare(shape: str, rows: list[int], names: list[str]) -> Iterator[str]:
    """Lines of Markdown for one shape of Llama-3-8B."""
    outputs, inputs = SHAPES[shape]
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")
    packed = {name: random_packed(LAYOUTS[name], outputs, inputs, "cuda") for name in names}
    with alone_in_vllm():
        peers = dict(vllm_kernels(outputs, inputs))
    yield f"| {shape} {outputs} × {inputs}, M | bf16 µs | " + " | ".join([*names, *peers]) + " |"
    yield "|--:" * (2 + len(names) + len(peers)) + "|"
    for m in rows:
        x = torch.randn(m, inputs, dtype=torch.bfloat16, device="cuda")
        calls: dict[str, Callable[[], Any]] = {
            "bf16": functools.partial(torch.nn.functional.linear, x, weight)
        }
        for name, arrays in packed.items():
            text = LAYOUTS[name].to_text()
            calls[name] = functools.partial(op.gpu_linear, x, arrays, None, [outputs], text)
        for name, call in peers.items():
            calls[name] = functools.partial(call, x)
        times = interleaved(calls)
        ratios = " | ".join(f"{times[n] / times['bf16']:.2f}" for n in [*names, *peers])
        yield f"| {m} | {times['bf16'] * 1e3:.1f} | {ratios} |"


def main() -> None:
    """Command line; leaves with a sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench: this machine has no GPU that torch can use\n")
    print(f"{torch.cuda.get_device_name()}, time / time of torch's bfloat16 product\n")
    for shape in options.shape or SHAPES:
        for line in compare(shape, options.rows, options.layout or list(LAYOUTS)[:3]):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
