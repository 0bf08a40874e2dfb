"""Backend `vllm_mixed_precision`: vLLM's best 4-bit kernel, salient weights added after.

vLLM chooses the kernel (Marlin, Machete, …).
That kernel gets the packed tensors as a checkpoint of compressed-tensors would hold them. It knows
scales of the type of the activations only, so a base weight is off by half a unit in the last place
of its scale: 2**-8 of itself in bfloat16, 2**-11 in float16. Salient weights are not.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.triton import backend as triton
from precalib_kernels.backends.triton import salient_op
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import pack_bits
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.kernels.linear import (
        MPLinearKernel,
        MPLinearLayerConfig,
        choose_mp_linear_kernel,
    )
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.scalar_type import scalar_types

CODES_PER_WORD = 8  # of four bits in 32
# Kernels that keep three tensors under names they are given. Humming has names of its own.
KNOWN = ("MacheteLinearKernel", "MarlinLinearKernel", "TritonW4A16LinearKernel")


class MixedPrecisionBackend(Backend):
    """About the memory of the file, and salient weights at 24 bits each.

    A column scale is multiplied into x, so fused shards that have one are products of their own.
    A ragged last group is filled with columns of zeros.
    """

    name = "vllm_mixed_precision"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.missing = -spec.input_size % spec.layout.group_size
        self.products = [
            Product(index, rows, kernel_for(spec, rows.stop - rows.start))
            for index, rows in enumerate(row_slices(spec))
        ]

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """It needs a GPU, half-precision activations, and a kernel of vLLM for the layout."""
        if reason := super().can_run(spec):
            return reason
        layout = spec.layout
        if spec.device != "cuda":
            return f"computes on GPUs, not on {spec.device}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not in {spec.dtype}"
        if layout.bits != 4:
            return f"vLLM's own kernels are for 4-bit codes, not for {layout.bits} bits"
        if not layout.uniform:
            what = "a trellis" if layout.trellis else "a table of levels"
            return f"vLLM's own kernels know uniform levels only, not {what}"
        if layout.salient_count and not triton.has_triton():
            return "salient weights need Triton, which is not installed or has no driver"
        for rows in row_slices(spec):
            if reason := reason_against(spec, rows.stop - rows.start):
                return reason
        return None

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """What vLLM's kernel makes of the base, and the arrays of `salient_op`, of every product.

        Raises FormatError also for zero points of more than four bits.
        """
        if bool((tensors["zeros"] >= 16).any()):
            raise FormatError(
                f"{where}: 'zeros' holds {int(tensors['zeros'].max())}, more than the 4 bits that "
                "vLLM's own kernels have for it; take another backend"
            )
        prepared: dict[str, Tensor] = {}
        for product in self.products:
            part = {name: t[product.rows] for name, t in tensors.items() if name != "column_scale"}
            scales = (
                reference.group_scales(part, self.spec.layout) / self.spec.layout.codebook_limit
            )
            steps = scales.to(self.spec.dtype)
            prepared |= product.base(part, steps, self.missing)
            if self.spec.layout.salient_count:
                arrays = salient_op.salient_arrays(
                    part, steps, self.spec.layout, self.spec.input_size, where
                )
                prepared |= {product.name(key): array for key, array in arrays.items()}
            if self.spec.layout.column_scale:
                scale = tensors["column_scale"][product.index]
                prepared[product.name("column_scale")] = scale.clone()
        return prepared

    def finish(self, layer: torch.nn.Module) -> None:
        """Compile every kernel that serving can reach, so that none is compiled later."""
        device = layer.get_parameter("qweight").device
        if device.type == "cuda":
            warm_up(self, layer, device)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """A product by vLLM's kernel and one call of `precalib::gpu_sparse`, for every product."""
        results = []
        for product in self.products:
            scaled = x
            if self.spec.layout.column_scale:
                scaled = (x * layer.get_parameter(product.name("column_scale"))).to(x.dtype)
            wide = torch.nn.functional.pad(scaled, (0, self.missing)) if self.missing else scaled
            y = product.kernel.apply_weights(layer, wide)  # no bias: Marlin wants it permuted
            shift = None if bias is None else bias[product.rows]
            if self.spec.layout.salient_count:
                positions, values, unit = (
                    layer.get_parameter(product.name(key)) for key in salient_op.NAMES
                )
                y = salient_op.gpu_sparse(
                    y, scaled, positions, values, unit, shift, self.spec.layout.group_size
                )
            elif shift is not None:
                y = y + shift
            results.append(y)
        return results[0] if len(results) == 1 else torch.cat(results, -1)


class Product:
    """Rows of the layer that one kernel of vLLM computes.

    index:  among the products of the layer.
    rows:   where they lie in the layer.
    kernel: vLLM's class and the configuration it was chosen for.
    """

    def __init__(
        self, index: int, rows: slice, kernel: tuple[type[MPLinearKernel], MPLinearLayerConfig]
    ) -> None:
        self.index = index
        self.rows = rows
        self.names = [self.name(key) for key in ("qweight", "scales", "zeros")]
        self.kernel = kernel[0](kernel[1], *self.names)

    def name(self, key: str) -> str:
        """Name of a parameter of the layer; the first product has the plain ones."""
        return f"{key}_{self.index}" if self.index else key

    def base(self, tensors: Mapping[str, Tensor], steps: Tensor, missing: int) -> dict[str, Tensor]:
        """What the kernel makes of codes, scales [N, G] and zero points, by name.

        missing: columns that fill the last group.
        """
        words = torch.nn.functional.pad(tensors["qweight"], (0, missing // 2)).view(torch.int32)
        zeros = pack_bits(tensors["zeros"].T.contiguous(), 4).view(torch.int32).T.contiguous()
        shared: dict[str, Any] = {
            "input_dim": 1,
            "output_dim": 0,
            "weight_loader": torch.Tensor.copy_,  # vLLM's classes want one; it is never called
        }
        packed = shared | {"packed_factor": CODES_PER_WORD}
        parameters = (
            PackedvLLMParameter(data=words, packed_dim=1, **packed),
            GroupQuantScaleParameter(data=steps, **shared),
            PackedvLLMParameter(data=zeros, packed_dim=0, **packed),
        )
        holder = torch.nn.Module()
        for name, parameter in zip(self.names, parameters, strict=True):
            holder.register_parameter(name, parameter)
        self.kernel.process_weights_after_loading(holder)
        return {name: holder.get_parameter(name).data for name in self.names}


def row_slices(spec: LinearSpec) -> Iterator[slice]:
    """Rows of every product: all, or those of each fused shard if shards have column scales."""
    sizes = spec.shard_sizes if spec.layout.column_scale else (sum(spec.shard_sizes),)
    ends = itertools.accumulate(sizes, initial=0)
    return (slice(start, end) for start, end in itertools.pairwise(ends))


def kernel_for(spec: LinearSpec, rows: int) -> tuple[type[MPLinearKernel], MPLinearLayerConfig]:
    """The kernel that vLLM takes for a product of so many rows, and what it was asked.

    Raises ValueError, vLLM's own, if it has none.
    """
    layout = spec.layout
    shape = layout.groups(spec.input_size) * layout.group_size, rows
    config = MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=scalar_types.uint4,
        act_type=spec.dtype,
        group_size=layout.group_size,
        zero_points=True,
    )
    return choose_mp_linear_kernel(config), config


def reason_against(spec: LinearSpec, rows: int) -> str | None:
    """Why no kernel of vLLM can take a product of so many rows, or None."""
    if rows % CODES_PER_WORD:
        return f"vLLM's own kernels take rows in eights, which {rows} is not"
    try:
        kernel, _ = kernel_for(spec, rows)
    except ValueError as error:
        return f"vLLM has no kernel of its own: {shortened(str(error))}"
    if kernel.__name__ not in KNOWN:
        return (
            f"vLLM chooses {kernel.__name__}, whose layout precalib does not know; "
            "VLLM_DISABLED_KERNELS can exclude it"
        )
    return None


def warm_up(
    backend: MixedPrecisionBackend,
    layer: torch.nn.Module,
    device: torch.device,
    warm_ups: triton.WarmUps = triton.WARM_UPS,
) -> None:
    """Run every kernel of `salient_op` once, for the first layer of its kind in this process."""
    rows = salient_op.warm_up_rows()
    for x, bias in warm_ups.inputs(backend.name, backend.spec, device, rows):
        backend.apply(layer, x, bias)


def shortened(refusals: str) -> str:
    """vLLM's refusal, a heading and a line per kernel, with the first clause of each line."""
    lines = [" ".join(line.split()) for line in refusals.splitlines()]
    clauses = [line.replace(" cannot implement due to", "").partition(",")[0] for line in lines]
    return "; ".join(clauses[1:] or clauses)
