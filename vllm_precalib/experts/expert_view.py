"""One matrix of one expert, or of all, as a backend looks at it."""

import dataclasses
from typing import cast

import torch
from torch import Tensor

from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.fused_moe import RoutedExperts

ALL = slice(None)  # experts of a layer, stacked


@dataclasses.dataclass(frozen=True)
class ExpertView:
    """The parameters of one matrix, found as a backend finds them in a layer.

    expert: whose, or ALL.
    """

    layer: RoutedExperts
    matrix: str
    expert: int | slice

    def get_parameter(self, name: str) -> Tensor:
        """What `Backend.prepare` returned under this name."""
        return cast(Tensor, getattr(self.layer, f"{self.matrix}_{name}")[self.expert])

    __getattr__ = get_parameter


def view(layer: RoutedExperts, matrix: str, expert: int | slice) -> torch.nn.Module:
    """What a backend takes for a layer: one matrix of one expert, or of ALL, stacked."""
    return cast(torch.nn.Module, ExpertView(layer, matrix, expert))


def bias_of(layer: RoutedExperts, matrix: str, expert: int | slice) -> Tensor | None:
    """The bias [N] of one expert, or [experts, N] of ALL; None if there is none."""
    biases = getattr(layer, f"{matrix}_bias", None)
    return None if biases is None else biases[expert]
