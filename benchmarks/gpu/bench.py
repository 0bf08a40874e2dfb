"""Times of the GPU kernels on a machine that has a GPU: `python benchmarks/gpu/bench.py`.

Every candidate of a shape is timed in the same run, in interleaved rounds inside CUDA graphs, over
weights outside the cache, and the median of its ratios to bfloat16's plain product is given. Where
vLLM is installed, its own W4A16 kernels are timed as well.
"""

import argparse
import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
from cost_model import LAYOUTS, SHAPES
from torch import Tensor

from precalib_kernels.backends.triton import op

ROUNDS = 7


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
    dense = measure.cold_copies([torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")])
    packed = {
        name: measure.cold_copies(measure.packed_arrays(LAYOUTS[name], outputs, inputs))
        for name in names
    }
    peers: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    with alone_in_vllm():
        for _ in range(measure.CALLS):  # a weight for every call, as they have no common form
            for name, call in vllm_kernels(outputs, inputs):
                peers.setdefault(name, []).append(call)
    yield f"| {shape} {outputs} × {inputs}, M | bf16 µs | " + " | ".join([*names, *peers]) + " |"
    yield "|--:" * (2 + len(names) + len(peers)) + "|"
    for m in rows:
        x = torch.randn(m, inputs, dtype=torch.bfloat16, device="cuda")
        calls: dict[str, list[Callable[[], Any]]] = {
            "bf16": [functools.partial(torch.nn.functional.linear, x, w) for (w,) in dense]
        }
        for name, copies in packed.items():
            text = LAYOUTS[name].to_text()
            calls[name] = [
                functools.partial(op.gpu_linear, x, arrays, None, [outputs], text)
                for arrays in copies
            ]
        for name, kernels in peers.items():
            calls[name] = [functools.partial(kernel, x) for kernel in kernels]
        times = measure.interleaved(calls, ROUNDS)
        ratios = " | ".join(f"{times.ratio(n, 'bf16'):.2f}" for n in [*names, *peers])
        yield f"| {m} | {times.median('bf16') * 1e3:.1f} | {ratios} |"


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
