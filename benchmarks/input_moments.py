"""What the open questions need to know of a model's inputs, and of what errors there cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.calibration.activations import linear_layers, observe
from offline_quantize.method.input_statistics import InputStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_moments(
    model: "PreTrainedModel", weights: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> dict[str, InputStatistics]:
    """E[x²] and E[x·xᵀ] of the layers that own `weights`, by their names; one forward pass."""
    layers = linear_layers(model, {name: weight.shape for name, weight in weights.items()})
    found: dict[str, InputStatistics] = {}
    for _, of_block in observe(model, windows, layers, hessians=True):
        found |= of_block
    return found


def fisher_diagonals(
    model: "PreTrainedModel", weights: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """E[g²·x²] for every weight, float32 [N, K] by name; one backward pass a window.

    g is the gradient, with respect to the layer's outputs, of the loss of a label that the model
    draws itself. Gradients of different tokens count as independent.
    """
    model.requires_grad_(False)
    tokens = sum(len(window) for window in windows)
    sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(_recorder(total))
        for name, total in sums.items()
    ]
    generator = torch.Generator(model.device).manual_seed(0)
    try:
        for window in windows:
            _drawn_loss(model, window, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def _drawn_loss(model: "PreTrainedModel", window: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss over a window, of labels drawn from what the model predicts."""
    embedded = model.get_input_embeddings()(window[None].to(model.device))
    logits: Tensor = model(inputs_embeds=embedded.detach().requires_grad_()).logits[0].float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _recorder(total: Tensor) -> Callable[..., None]:
    """A forward hook that has the backward pass add Σ g²·x² to `total`."""

    def record(_: Any, given: tuple[Tensor], out: Tensor) -> None:
        squares = given[0].detach().flatten(0, -2).float().square()

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float().square()
            total.add_((g.T @ squares).cpu())

        out.register_hook(add)

    return record
