"""How far a mean could be off: percentile bootstrap (Efron 1979), seeded."""

import torch
from torch import Tensor

DRAWS = 2000  # resampled means
BLOCK = 64  # neighbouring tokens are drawn together, since they depend on each other
MINIMUM_BLOCKS = 8


def mean_interval(values: Tensor, block: int = 1) -> tuple[float, float]:
    """95 % interval of the mean of values [n], drawn with replacement in blocks of neighbours.

    The last block may be shorter; with less than 8 blocks' worth of values the blocks shrink.
    """
    count = len(values)
    block = max(1, min(block, count // MINIMUM_BLOCKS))
    padded = torch.nn.functional.pad(values.double(), (0, -count % block)).view(-1, block)
    sizes = torch.full((len(padded),), float(block), dtype=torch.float64)
    sizes[-1] -= -count % block
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(padded), (DRAWS, len(padded)), generator=generator)
    means = padded.sum(1)[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
