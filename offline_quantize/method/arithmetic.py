"""Arithmetic that several stages share: exact factors, divisions by zero, groups of columns."""

import math

import torch
from torch import Tensor


def power_of_two(largest: float) -> float:
    """The factor that brings magnitudes up to `largest` to about 1 and rounds nothing.

    float32 holds it and its inverse: it lies between 2**-126 and 2**126.
    """
    return 2.0 ** -max(-126, min(math.frexp(largest)[1], 126))


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0."""
    return torch.where(scale > 0, 1 / scale, 0)


def in_groups(weight: Tensor, size: int) -> Tensor:
    """Weights [N, K] as [N, G, size], a ragged last group filled up with zeros."""
    padding = -weight.shape[1] % size
    padded = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
    return padded.reshape(len(weight), -1, size)
