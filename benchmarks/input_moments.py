"""What the open questions need to know of a model's inputs, from text that it writes itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.method.input_statistics import InputStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of one linear layer y = x·Wᵀ with W [N, K].

    inputs:  E[x²] over the tokens.
    hessian: E[x·xᵀ], float32 [K, K].
    fisher:  E[g²·x²] for every weight, float32 [N, K]; g is the gradient, with respect to y, of the
             loss of a label that the model draws itself. Tokens' gradients count as independent.
    """

    inputs: InputStatistics
    hessian: Tensor
    fisher: Tensor


def moments(
    model: "PreTrainedModel", weights: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> dict[str, Moments]:
    """Moments of the layers that own `weights`, by their names; one backward pass a window."""
    model.requires_grad_(False)
    tokens = sum(len(window) for window in windows)
    products = {name: torch.zeros(2 * weight.shape[1:]) for name, weight in weights.items()}
    fisher = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    handles = []
    for name in weights:
        hook = _recorder(products[name], fisher[name])
        handles.append(
            model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)
        )
    generator = torch.Generator(model.device).manual_seed(0)
    try:
        for window in windows:
            _drawn_loss(model, window, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Moments(
            InputStatistics(products[name].diagonal() / tokens),
            products[name] / tokens,
            fisher[name] / tokens,
        )
        for name in weights
    }


def _drawn_loss(model: "PreTrainedModel", window: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss over a window, of labels drawn from what the model predicts."""
    embedded = model.get_input_embeddings()(window[None].to(model.device))
    logits: Tensor = model(inputs_embeds=embedded.detach().requires_grad_()).logits[0].float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _recorder(products: Tensor, fisher: Tensor) -> Callable[..., None]:
    """A forward hook that adds Σ x·xᵀ to `products`; Σ g²·x² to `fisher` in the backward pass."""

    def record(_: Any, given: tuple[Tensor], out: Tensor) -> None:
        x = given[0].detach().flatten(0, -2).float()
        products.add_((x.T @ x).cpu())
        squares = x.square()

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float().square()
            fisher.add_((g.T @ squares).cpu())

        out.register_hook(add)

    return record
