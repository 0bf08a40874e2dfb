"""The sum over a token's experts by grouped products: nothing waits for the device."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from precalib_kernels.backends.routes import MOST_ROUTES, Grouping, Routes, sorted_routes
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

Product = Callable[[Tensor, Grouping], Tensor]  # rows of x to rows of routes


@dataclasses.dataclass(frozen=True)
class Sorting:
    """How routes are sorted by expert.

    experts:    number of the model's experts.
    expert_map: this rank's number of each of them, negative for those of others; None if it has
                all, under their own numbers.
    block:      places of a block for the rows that an expert gets on average.
    """

    experts: int
    expert_map: Tensor | None
    block: Callable[[int], int]

    def routes(self, ids: Tensor) -> Routes:
        """The routes of tokens; ids [tokens, chosen] are the model's numbers."""
        block = self.block(-(-ids.numel() // self.experts))
        if ids.is_cuda:  # one kernel of vLLM's
            found = moe_align_block_size(
                ids, block, self.experts, self.expert_map, ignore_invalid_experts=True
            )
            return Routes(*found[:3], block)
        local = ids if self.expert_map is None else self.expert_map[ids.long()]
        return sorted_routes(local, self.experts, block)


def grouped_mixture(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    sorting: Sorting,
    products: tuple[Product, Product],
    activation: Callable[[Tensor], Tensor],
    weight_inputs: bool = False,
) -> Tensor:
    """Σ_j weights[t, j] · f_e(x[t]) with e = ids[t, j], as `mixture.mixture` has it.

    products: the two of an expert, before and after `activation`.
    """
    chosen = ids.shape[1]
    most = max(1, MOST_ROUTES // chosen)
    sums = [
        _of_some(*some, sorting, products, activation, weight_inputs)
        for some in zip(x.split(most), weights.split(most), ids.split(most), strict=True)
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _of_some(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    sorting: Sorting,
    products: tuple[Product, Product],
    activation: Callable[[Tensor], Tensor],
    weight_inputs: bool,
) -> Tensor:
    chosen = ids.shape[1]
    complete = sorting.expert_map is None
    routes = sorting.routes(ids)
    factors = None if weight_inputs else weights.flatten().float()
    given, top_k = x, chosen
    if weight_inputs:
        given, top_k = (x[:, None] * weights[..., None].to(x)).flatten(0, 1), 1
    inner = activation(products[0](given, Grouping(routes, top_k))).to(x.dtype)
    outputs = products[1](inner, Grouping(routes, 1, factors, complete))
    return outputs.view(*ids.shape, outputs.shape[-1]).sum(1)


def warm_up_tokens(limits: Sequence[int], experts: int, chosen: int) -> Iterator[int]:
    """Numbers of tokens that reach every kernel, whether its sums over K are split or not.

    limits: the largest numbers of rows per expert of each of a backend's kernels.
    """
    most = max(1, MOST_ROUTES // chosen)
    least = 1
    for limit in (*limits[:-1], MOST_ROUTES):
        end = min(most, max(1, limit * experts // chosen))
        if least <= end:
            yield least
            if end > least:
                yield end
        least = end + 1
