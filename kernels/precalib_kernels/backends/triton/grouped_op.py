"""`precalib::gpu_grouped_linear`: products of rows with the weights of their experts."""

import torch
from torch import Tensor

from precalib_kernels.backends.routes import Grouping, Routes
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.launch_configs import TABLE, blocks_for
from precalib_kernels.backends.triton.memory_layout import triton_layout
from precalib_kernels.format.layout import Layout
from precalib_kernels.ops import named_arrays


def gpu_grouped_linear(
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    grouping: Grouping,
    shard_sizes: list[int],
    layout: str,
) -> Tensor:
    """`precalib::gpu_grouped_linear`: factors · (x·Ŵₑᵀ + biasₑ), [tokens, K] to [routes, N].

    packed: as `repack` gives them, those of all experts stacked, in the order of `array_order`.
    bias:   [experts, N], or None.
    """
    routes = grouping.routes
    result: Tensor = torch.ops.precalib.gpu_grouped_linear(
        x, packed, bias, routes.sorted, routes.expert_ids, routes.used, grouping.factors,
        grouping.top_k, routes.block, grouping.complete, shard_sizes, layout,
    )  # fmt: skip
    return result


def _gpu_grouped_linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, routes: Tensor, expert_ids: Tensor,
    used: Tensor, factors: Tensor | None, top_k: int, block: int, complete: bool,
    shard_sizes: list[int], layout: str,
) -> Tensor:  # fmt: skip
    parsed = Layout.from_text(layout)
    experts = packed[0].shape[0]
    arrays = named_arrays(packed, x.shape[-1], shard_sizes, parsed, (experts,))
    if x.shape[0] == 0:
        return x.new_empty((0, sum(shard_sizes)))
    blocks = blocks_for(op.family(), block, triton_layout(parsed).step)
    assert blocks is not None, f"no kernel for blocks of {block} rows"
    for name in ("tiles", "table", "constants"):
        arrays[name] = arrays[name][0]  # alike for all experts
    grouping = Grouping(Routes(routes, expert_ids, used, block), top_k, factors, complete)
    return op.gemm(x, arrays, bias, parsed, shard_sizes, blocks, grouping)


# for every device: under Triton's interpreter kernels run on the CPU
torch.library.register_kernel("precalib::gpu_grouped_linear", None, _gpu_grouped_linear)


def route_block(rows: int) -> int:
    """Places of a block where an expert gets about so many rows of x."""
    entries = TABLE[op.family()]
    fitting = (blocks for most, blocks in entries.items() if rows <= most)
    return next(fitting, entries[max(entries)]).block_m


def row_limits() -> tuple[int, ...]:
    """The largest numbers of rows that each kernel is for."""
    return tuple(TABLE[op.family()])
