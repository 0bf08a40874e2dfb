"""Routes of tokens in blocks, against a loop and vLLM's own example."""

import pytest
import torch

from precalib_kernels.backends.routes import sorted_routes


def by_hand(ids, count, block):
    """Blocks of each expert in turn: its routes, then what stands for none."""
    flat, routes, experts = ids.flatten().tolist(), [], []
    for expert in range(count):
        mine = [route for route, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        routes += mine
        experts += [expert] * (len(mine) // block)
    return routes, experts


def test_the_example_of_vllm():
    """From the text of its `moe_align_block_size`, whose experts count from 1."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]) - 1
    routes = sorted_routes(ids, 4, 4)
    expected = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert routes.sorted[:16].tolist() == expected
    assert routes.expert_ids[:4].tolist() == [0, 1, 2, 3]
    assert routes.used.tolist() == [16]


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize(("tokens", "chosen", "count"), [(1, 2, 8), (7, 3, 4), (200, 2, 5)])
def test_blocks_are_those_of_a_loop(tokens, chosen, count, block):
    ids = torch.randint(-1, count - 1, (tokens, chosen), dtype=torch.int32)
    routes = sorted_routes(ids, count, block)
    expected, experts = by_hand(ids, count, block)
    used = int(routes.used)
    assert used == len(expected)
    assert routes.sorted[:used].tolist() == expected
    assert routes.expert_ids[: used // block].tolist() == experts
    assert len(routes.sorted) == block * len(routes.expert_ids)
    assert len(routes.expert_ids) >= len(experts)


def test_nobody_chooses_an_expert_of_this_rank():
    routes = sorted_routes(torch.full((3, 2), -1), 4, 8)
    assert routes.used.tolist() == [0]
    assert set(routes.expert_ids.tolist()) == {-1}


def test_nothing_is_asked_of_the_device():
    """On the meta device, whose values nobody can ask for."""
    routes = sorted_routes(torch.zeros(5, 2, dtype=torch.int64, device="meta"), 4, 8)
    assert routes.sorted.shape == (5 * 8,)
    assert routes.used.shape == (1,)
