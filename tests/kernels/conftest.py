"""Packed tensors for the tests of format and kernels."""

from collections.abc import Callable

import pytest
import torch
from packed_tensors import Packed, random_packed


@pytest.fixture
def make_packed() -> Callable[..., Packed]:
    """`random_packed`."""
    return random_packed


@pytest.fixture
def as_layer() -> Callable[..., torch.nn.Module]:
    """A layer that holds what a backend's `prepare` returned, finished by that backend."""

    def make(backend, tensors, where="fc") -> torch.nn.Module:
        layer = torch.nn.Module()
        for name, tensor in backend.prepare(tensors, where).items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        backend.finish(layer)
        return layer

    return make
