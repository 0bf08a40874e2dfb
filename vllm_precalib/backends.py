"""The ways to compute with packed weights, best first, and the choice between them.

To add one, write its class (`precalib_kernels.backends.base`) in a file of its own and put it
into `BACKENDS`.
"""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.errors import ServingError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout
from vllm_precalib.compat import vllm_names
from vllm_precalib.mixed_precision_backend import MixedPrecisionBackend
from vllm_precalib.triton_backend import TritonBackend

with vllm_names():
    from vllm.logger import init_logger
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

logger = init_logger("vllm.precalib")

FORMER_NAMES = {"native": "x86", "stock": "vllm_mixed_precision"}  # still understood
CHUNK_WEIGHTS = 1 << 22  # weights unpacked at a time: their float32 and index form is large


class ReferenceBackend(Backend):
    """Unpacks the weight at every call: the memory of the file, and very slow."""

    name = "reference"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.names = tuple(spec.layout.tensors(sum(spec.shard_sizes), spec.input_size))
        self.layout_text = spec.layout.to_text()

    @staticmethod
    def can_run(spec: LinearSpec) -> str | None:  # noqa: ARG004
        """It always can."""
        return None

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors as they are, once it is known that they can be unpacked."""
        for _ in unpacked_rows(tensors, self.spec, where):
            pass
        return dict(tensors)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::linear`."""
        packed = [getattr(layer, name) for name in self.names]
        return ops.linear(x, packed, bias, list(self.spec.shard_sizes), self.layout_text)


class DenseBackend(Backend):
    """Unpacks once, then is an ordinary linear layer of vLLM: as fast, and as large."""

    name = "dense"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.unquantized = UnquantizedLinearMethod()

    @staticmethod
    def can_run(spec: LinearSpec) -> str | None:  # noqa: ARG004
        """It always can."""
        return None

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The weight [N, K] in the type of the activations."""
        shape = sum(self.spec.shard_sizes), self.spec.input_size
        weight = torch.empty(shape, dtype=self.spec.dtype, device=tensors["qweight"].device)
        for rows, values in unpacked_rows(tensors, self.spec, where):
            weight[rows] = values
        return {"weight": weight}

    def finish(self, layer: torch.nn.Module) -> None:
        """Let vLLM lay the weight out for this machine."""
        self.unquantized.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """vLLM's own product."""
        return self.unquantized.apply(layer, x, bias)


BACKENDS: tuple[type[Backend], ...] = (
    X86Backend,
    TritonBackend,
    MixedPrecisionBackend,
    DenseBackend,
    ReferenceBackend,
)


def choose(
    spec: LinearSpec,
    wanted: str | None,
    where: str,
    layout_name: str,
    table: tuple[type[Backend], ...] = BACKENDS,
) -> Backend:
    """The backend `wanted`, or the first of `table` that can run, saying so once per layout.

    Raises ServingError if there is no such backend, or it cannot run, with the reasons.
    """
    wanted = next((new for old, new in FORMER_NAMES.items() if old == wanted), wanted)
    names = [backend.name for backend in table]
    if wanted is not None and wanted not in names:
        raise ServingError(
            f'additional_config {{"precalib": {{"backend": "{wanted}"}}}}: '
            f"there is no such backend; choose one of {', '.join(names)}"
        )
    refused: list[str] = []
    for backend in table:
        if wanted in (None, backend.name):
            if spec.int8_activations and not backend.int8_activations:
                reason: str | None = "has no 8-bit activations"
            else:
                reason = backend.can_run(spec)
            if reason is None:
                why = "asked for" if wanted else "; ".join(["first that can run", *refused])
                if spec.int8_activations:
                    why += "; activations in 8 bits, as asked for"
                logger.info_once(
                    "precalib computes layout %s with backend %s (%s)",
                    layout_name,
                    backend.name,
                    why,
                )
                return backend(spec)
            refused.append(f"{backend.name}: {reason}")
    raise ServingError(f"{where}: no backend can run this layer ({'; '.join(refused)})")


def describe() -> Iterator[tuple[str, str | None]]:
    """Name of every backend, with the reason why it cannot run an ordinary layer here, or None."""
    layout = Layout(bits=4, group_size=128)
    spec = LinearSpec(layout, 4096, (4096,), torch.bfloat16, current_platform.device_type)
    return ((backend.name, backend.can_run(spec)) for backend in BACKENDS)


def unpacked_rows(
    tensors: Mapping[str, Tensor], spec: LinearSpec, where: str
) -> Iterator[tuple[slice, Tensor]]:
    """Ŵ in float32 a few rows at a time, which keeps the peak memory of unpacking low.

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
