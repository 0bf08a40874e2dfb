"""Arithmetic that several stages share: factors that round nothing, and divisions by zero."""

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
