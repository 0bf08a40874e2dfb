"""Memory in huge pages: shared regions, and nothing else shared."""

from concurrent.futures import ThreadPoolExecutor

import torch

from precalib_kernels.backends.x86.huge_pages import LINE, PAGE, REGION, HugePageArena


def test_tensors_share_regions_of_memory_and_nothing_else():
    arena = HugePageArena()
    made = [arena.zeros(size) for size in (1, 100, REGION + 1, 64, 0, 3 * PAGE)]
    for value, tensor in enumerate(made, 1):
        assert not bool(tensor.any())
        assert tensor.data_ptr() % LINE == 0
        tensor.fill_(value)
    for value, tensor in enumerate(made, 1):
        assert bool((tensor == value).all())
    many = [arena.zeros(PAGE) for _ in range(40)]  # several regions
    assert len({tensor.untyped_storage().data_ptr() for tensor in many}) < len(many)
    assert not bool(torch.cat(many).any())


def test_threads_get_memory_of_their_own():
    arena = HugePageArena()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(arena.zeros, [100] * 400))
    assert len({tensor.data_ptr() for tensor in made}) == 400
