"""Which rows go to which expert of a mixture, in blocks, for grouped products."""

import dataclasses

import torch
from torch import Tensor

MOST_ROUTES = 1 << 14  # of one grouped product: activations take up to 4 bytes per column and part


@dataclasses.dataclass(frozen=True)
class Routes:
    """The routes of some tokens, sorted by expert: what vLLM's `moe_align_block_size` gives.

    A route is one token's choice of one expert: route k · t + j is choice j of token t, of k. Every
    expert's routes are padded to whole blocks of places.

    sorted:     int32 [places], the route in each place; the number of routes, or more, for none.
    expert_ids: int32 [blocks], the expert that computes a block; negative for none.
    used:       int32 [1], how many of the places are in use, the first of them.
    block:      places of a block.
    """

    sorted: Tensor
    expert_ids: Tensor
    used: Tensor
    block: int


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How the rows of one grouped product are distributed over experts.

    routes:   which expert computes which rows.
    top_k:    routes of a row of x. 1 where every route has a row of its own.
    factors:  float32 [routes], what results are multiplied by; None for nothing.
    complete: whether every route has a place; if not, rows of others are zeros.
    """

    routes: Routes
    top_k: int
    factors: Tensor | None = None
    complete: bool = True


def sorted_routes(experts: Tensor, count: int, block: int) -> Routes:
    """The routes of tokens in blocks, by torch alone and without waiting for the device.

    experts: [tokens, chosen] whole numbers below `count`; negative for experts of other ranks,
             whose routes are left out.
    """
    flat, device = experts.flatten().long(), experts.device
    flat = torch.where(flat < 0, count, flat)  # the last of count + 1, which gets no blocks
    order = flat.argsort(stable=True)
    rows = torch.zeros(count + 1, dtype=torch.int64, device=device)
    rows.scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (rows + block - 1) // block
    blocks[count] = 0
    ends = blocks.cumsum(0)
    most = min(flat.numel(), flat.numel() // block + count)  # blocks that there can be
    numbers = torch.arange(most, device=device)
    expert_ids = torch.searchsorted(ends[:count], numbers, right=True)
    expert_ids = torch.where(expert_ids < count, expert_ids, -1)
    # place of a route: where its expert's blocks begin, and how many of the expert's come before
    own = flat[order]
    before = torch.arange(flat.numel(), device=device) - (rows.cumsum(0) - rows)[own]
    places = ((ends - blocks) * block)[own] + before
    routes = torch.full((most * block + 1,), flat.numel(), dtype=torch.int32, device=device)
    routes[torch.where(own < count, places, most * block)] = order.int()
    return Routes(routes[:-1], expert_ids.int(), (ends[count : count + 1] * block).int(), block)
