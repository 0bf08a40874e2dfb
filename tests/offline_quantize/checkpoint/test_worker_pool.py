import pytest
import torch

from offline_quantize.checkpoint.worker_pool import worker_pool


def test_torch_has_one_thread_while_the_pool_works():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with worker_pool(3) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(3))) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="damaged"), worker_pool(1):
            raise ValueError("damaged")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
