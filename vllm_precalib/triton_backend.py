"""Backend `triton`: fused kernels for NVIDIA and AMD GPUs, straight from packed weights."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.memory_layout import reason_against, triton_layout
from precalib_kernels.backends.triton.repack import repack
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

_warm: set[tuple[str, LinearSpec, torch.device]] = set()  # layers whose kernels are compiled

MIN_CAPABILITY = 80  # NVIDIA: tensor-core products of 16 columns and asynchronous copies


class TritonBackend(Backend):
    """About the memory of the file; base and salient weights in one kernel."""

    name = "triton"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.names = op.array_order(spec.layout)
        self.layout_text = spec.layout.to_text()
        self.shard_sizes = list(spec.shard_sizes)

    @staticmethod
    def can_run(spec: LinearSpec) -> str | None:
        """It needs a GPU, Triton, half-precision activations and a layout with a kernel."""
        if spec.device != "cuda":
            return f"computes on GPUs, not on {spec.device}"
        if not HAS_TRITON:
            return "Triton is not installed or has no driver"
        if current_platform.is_cuda() and not current_platform.has_device_capability(
            MIN_CAPABILITY
        ):
            return "needs compute capability 8.0"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not in {spec.dtype}"
        reason = reason_against(spec.layout)
        if reason is None and triton_layout(spec.layout).in_place and _flushes_subnormals():
            return "its salient weights are subnormal numbers of fp16, which MI200 takes for zero"
        return reason

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The arrays of `precalib_kernels.backends.triton.memory_layout`."""
        arrays = repack(
            tensors, self.spec.layout, self.spec.input_size, self.spec.shard_sizes, where
        )
        return {name: arrays[name] for name in self.names}

    def finish(self, layer: torch.nn.Module) -> None:
        """Compile every kernel that serving can reach, so that none is compiled later."""
        arrays = [layer.get_parameter(name).data for name in self.names]
        if arrays[0].is_cuda:
            warm_up(self.spec, tuple(arrays))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::gpu_linear`."""
        packed = [layer.get_parameter(name) for name in self.names]
        return torch.ops.precalib.gpu_linear(x, packed, bias, self.shard_sizes, self.layout_text)


def _flushes_subnormals() -> bool:
    """Whether the GPU's matrix units take subnormal fp16 inputs for zero, as AMD's MI200 does."""
    if not current_platform.is_rocm():
        return False
    from vllm.platforms.rocm import on_gfx90a

    return on_gfx90a()


def warm_up(spec: LinearSpec, arrays: tuple[Tensor, ...]) -> None:
    """Run the operator once for every kernel, for the first layer of its kind in this process."""
    device, parts, layout = arrays[0].device, list(spec.shard_sizes), spec.layout.to_text()
    for x, bias in first_inputs(TritonBackend.name, spec, device, op.warm_up_rows()):
        op.gpu_linear(x, list(arrays), bias, parts, layout)


def first_inputs(
    backend: str, spec: LinearSpec, device: torch.device, row_counts: Iterable[int]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs of so many rows, without and with bias, for the first layer of its kind; else none."""
    kind = backend, spec, device
    if kind in _warm:
        return
    _warm.add(kind)
    bias = torch.zeros(sum(spec.shard_sizes), dtype=spec.dtype, device=device)
    for rows in row_counts:
        x = torch.zeros((rows, spec.input_size), dtype=spec.dtype, device=device)
        yield x, None
        yield x, bias
