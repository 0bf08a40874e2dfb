"""Second moments of made-up inputs."""

import torch
from torch import Tensor


def correlated(size: int, tokens: int | None = None, seed: int = 0) -> Tensor:
    """E[x·xᵀ] [size, size] of correlated inputs of uneven size, over `tokens` of them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + torch.randn((size, size), generator=generator) / size**0.5
    x = torch.randn((tokens or 4 * size, size), generator=generator) @ mix
    x *= torch.rand(size, generator=generator) + 0.1
    return x.T @ x / len(x)
