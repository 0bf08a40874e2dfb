"""Backend `triton`: fused kernels for NVIDIA and AMD GPUs, straight from packed weights."""

import functools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.routes import Grouping
from precalib_kernels.backends.triton import gather_op, grouped_op, op
from precalib_kernels.backends.triton.memory_layout import reason_against, triton_layout
from precalib_kernels.backends.triton.repack import repack

MIN_CAPABILITY = (8, 0)  # NVIDIA: tensor-core products of 16 columns and asynchronous copies


class TritonBackend(Backend):
    """Fused kernels: base and salient weights in one launch."""

    name = "triton"
    experts = True
    grouped = True

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.names = ops.array_order(spec.layout)
        self.layout_text = spec.layout.to_text()
        self.shard_sizes = list(spec.shard_sizes)

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """It needs a GPU, Triton, half-precision activations and a layout with a kernel."""
        if reason := super().can_run(spec):
            return reason
        if spec.device != "cuda":
            return f"computes on GPUs, not on {spec.device}"
        if not has_triton():
            return "Triton is not installed or has no driver"
        capability = compute_capability()
        if capability is not None and capability < MIN_CAPABILITY:
            return "needs compute capability 8.0"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not in {spec.dtype}"
        reason = reason_against(spec.layout)
        if reason is None and triton_layout(spec.layout).inline_salient and flushes_subnormals():
            return "its salient weights are subnormal numbers of fp16, which MI200 takes for zero"
        return reason

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The arrays of `memory_layout`."""
        arrays = repack(
            tensors, self.spec.layout, self.spec.input_size, self.spec.shard_sizes, where
        )
        return {name: arrays[name] for name in self.names}

    def finish(self, layer: torch.nn.Module) -> None:
        """Compile every kernel that serving can reach, so that none is compiled later."""
        arrays = [layer.get_parameter(name).data for name in self.names]
        if arrays[0].is_cuda:
            warm_up(self.spec, tuple(arrays))
            if self.spec.embedding:
                self.embedding(layer, torch.zeros(1, dtype=torch.int64, device=arrays[0].device))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::gpu_linear`."""
        packed: list[Tensor] = [layer.get_parameter(name) for name in self.names]
        return op.gpu_linear(x, packed, bias, self.shard_sizes, self.layout_text)

    def apply_grouped(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None, grouping: Grouping
    ) -> Tensor:
        """One call of `precalib::gpu_grouped_linear`."""
        packed: list[Tensor] = [layer.get_parameter(name) for name in self.names]
        return grouped_op.gpu_grouped_linear(
            x, packed, bias, grouping, self.shard_sizes, self.layout_text
        )

    def route_block(self, rows: int) -> int:
        """Of the fixed configurations."""
        return grouped_op.route_block(rows)

    def row_limits(self) -> tuple[int, ...]:
        """Of the fixed configurations."""
        return grouped_op.row_limits()

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It needs all rows in one part."""
        parts = len(spec.shard_sizes)
        return None if parts == 1 else f"looks up rows of one matrix, not of {parts} fused ones"

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """One call of `precalib::gpu_gather_rows`."""
        packed: list[Tensor] = [layer.get_parameter(name) for name in self.names]
        spec = self.spec
        return gather_op.gpu_gather_rows(
            ids, packed, spec.input_size, spec.output_size, self.layout_text, spec.dtype
        )


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed with exactly one driver for this machine's GPUs.

    Where all GPUs are hidden for now, as Ray does while it starts a worker, it needs no driver.
    """
    try:
        from triton.backends import backends
    except ImportError:
        return False
    active = [
        name
        for name, backend in backends.items()
        if name != "cpu" and backend.driver and backend.driver.is_active()
    ]
    shown = os.environ.get("HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES")
    hidden = shown is not None and not shown.strip()
    return len(active) == 1 or (hidden and not active)


def compute_capability() -> tuple[int, int] | None:
    """Of this process's NVIDIA GPU; None where there is none, or one of AMD."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def flushes_subnormals() -> bool:
    """Whether the GPU's matrix units take subnormal fp16 inputs for zero, as AMD's MI200 does."""
    if not torch.version.hip or not torch.cuda.is_available():
        return False
    return str(torch.cuda.get_device_properties().gcnArchName).startswith("gfx90a")


class WarmUps:
    """Remembers which kinds of layers had all of their kernels compiled.

    Triton keeps compiled kernels for the life of a process, and so must this.
    """

    def __init__(self) -> None:
        self._done: set[Hashable] = set()

    def first(self, kind: Hashable) -> bool:
        """Whether this is the first layer of a kind."""
        if kind in self._done:
            return False
        self._done.add(kind)
        return True

    def inputs(
        self, backend: str, spec: LinearSpec, device: torch.device, row_counts: Iterable[int]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs x of so many rows, each without and with a bias; none if the kind is done."""
        if not self.first((backend, spec, device)):
            return
        bias = torch.zeros(spec.output_size, dtype=spec.dtype, device=device)
        for rows in row_counts:
            x = torch.zeros((rows, spec.input_size), dtype=spec.dtype, device=device)
            yield x, None
            yield x, bias


WARM_UPS = WarmUps()  # of this process


def warm_up(spec: LinearSpec, arrays: tuple[Tensor, ...], warm_ups: WarmUps = WARM_UPS) -> None:
    """Run the operator once for every kernel, for the first layer of its kind in this process."""
    device, layout = arrays[0].device, spec.layout.to_text()
    for x, bias in warm_ups.inputs(TritonBackend.name, spec, device, op.warm_up_rows()):
        op.gpu_linear(x, list(arrays), bias, list(spec.shard_sizes), layout)
