"""Hessians of the model's loss, one for the inputs of each linear layer.

Error feedback makes E·H·Eᵀ small for the error E of each row of a weight. With H = E[x·xᵀ] that is
the error of the layer's output. Here H is taken from the gradient of the model's loss instead, so
that it also counts how much the model's output depends on what the layer does with an input.

Let ℓ be the negative log-likelihood of a window of text, x [T, K] the layer's inputs, and
d = ∂ℓ/∂z [T, N] the gradient at its outputs z. A window is cut into pieces of p tokens. G = dᵀ·x
over the tokens of one piece is the gradient of ℓ to the weight through them, and H = Σ Gᵀ·G over
all pieces:

    p = the whole window   output-adaptive calibration (OAC, arXiv 2405.15025); with labels drawn
                           from the model, the input side of sketch B of YAQA (arXiv 2505.22988)
    p = 1                  Σ ‖d‖² x·xᵀ over all tokens, which is GuidedQuant (arXiv 2505.07004)
                           with one group

The pieces between treat only tokens of one piece as dependent. G is never larger than one weight,
and only one block of the decoder has its activations' gradients and its Hessians in memory; of all
other blocks their inputs are kept.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from offline_quantize.method.arithmetic import power_of_two
from offline_quantize.method.input_statistics import InputStatistics
from precalib_kernels.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Labels = Literal["text", "model"]


@dataclasses.dataclass
class _Call:
    """How the model called one block with one batch, and the gradient at the block's output."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    gradient: Tensor | None = None


def output_hessians(
    model: "PreTrainedModel",
    windows: Sequence[Tensor],
    *,
    piece: int | None = None,
    labels: Labels = "text",
    batch: int = 1,
    seed: int = 0,
) -> Iterator[tuple[str, InputStatistics]]:
    """The statistics of every linear layer of the decoder's blocks, last block first.

    windows: tokens, int64 [T] each, at least 2.
    piece:   tokens p of a piece; None for the whole window.
    labels:  whether the next tokens that the loss asks for are the text's, or drawn from the model.
    batch:   windows of one length that go through the model together. A layer that sees tokens
             without their windows, as in a mixture of experts, needs 1.
    seed:    of the drawn labels.

    Yields the module's name, E[x²], and H times the number that gives it the trace of E[x·xᵀ]: one
    rule of damping then does for both. H is E[x²] on the diagonal where no gradient arrives.

    Raises UsageError for a model in float16, whose gradients underflow, and for a layer without
    windows if `batch` is above 1.
    """
    if model.dtype == torch.float16:
        raise UsageError(
            "gradients of a model in float16 underflow; load it in bfloat16 or float32"
        )
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    generator = torch.Generator(model.device).manual_seed(seed)
    with _frozen(model):
        calls = [
            _forward(model, blocks, tokens.to(model.device), labels, generator)
            for tokens in _batches(windows, batch)
        ]
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            sums = {
                f"{prefix}.{index}.{name}": _Sums(f"{prefix}.{index}.{name}", module, piece)
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear)
            }
            for blocks_calls in calls:
                _backward(block, blocks_calls, list(sums.values()))
            for name, found in sums.items():
                yield name, found.statistics()


def decoder_blocks(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder's blocks: the model's list of as many modules as it has layers.

    Raises UsageError for a model without one.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UsageError(f"{type(model).__name__} has no list of {count} blocks")


class _Sums:
    """Sums over pieces for one linear layer y = x·Wᵀ.

    Gradients are brought to size 1 by a power of two, found in the first window, since squares of
    small ones would underflow.
    """

    def __init__(self, name: str, module: nn.Module, piece: int | None) -> None:
        self.name, self.module, self.piece = name, module, piece
        self.hessian: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.tokens = 0
        self.unit: float | None = None

    def add(self, inputs: Tensor, gradient: Tensor, windows: int) -> None:
        """Take in the inputs [..., T, K] and the gradients [..., T, N] of a batch of windows."""
        if windows > 1 and (inputs.ndim < 3 or inputs.shape[0] != windows):
            raise UsageError(f"{self.name}: sees tokens without their windows; use a batch of 1")
        for x, d in zip(
            inputs.reshape(windows, -1, inputs.shape[-1]).float(),
            gradient.reshape(windows, -1, gradient.shape[-1]).float(),
            strict=True,
        ):
            self.square += x.square().sum(0)
            self.tokens += len(x)
            largest = float(d.abs().max()) if d.numel() else 0.0
            if self.unit is None and largest:
                self.unit = power_of_two(largest)
            if self.unit is not None:
                self.hessian += gradient_products(x, d * self.unit, self.piece)

    def statistics(self) -> InputStatistics:
        """Means over the tokens, H with the trace of E[x·xᵀ]."""
        mean_square = torch.as_tensor(self.square).float() / max(self.tokens, 1)
        hessian = torch.as_tensor(self.hessian)
        trace = float(hessian.trace()) if self.unit is not None else 0.0
        if not trace:
            return InputStatistics(mean_square, mean_square.diag())
        return InputStatistics(mean_square, hessian * (float(mean_square.sum()) / trace))


def gradient_products(x: Tensor, d: Tensor, piece: int | None) -> Tensor:
    """Σ Gᵀ·G over the pieces of one window, G = dᵀ·x over the tokens of a piece; [K, K].

    x: inputs [T, K];  d: gradients at the outputs [T, N];  piece: tokens, None for all.
    """
    tokens, inputs = x.shape
    outputs, size = d.shape[1], min(piece or tokens, tokens)
    if size == 1:
        return (x * d.square().sum(1, keepdim=True)).T @ x
    total = torch.zeros(inputs, inputs, device=x.device)
    # by G, or by the products of the gradients of every two tokens: whatever takes less
    if outputs * (size + inputs) < size * (outputs + inputs + inputs * inputs / size):
        for xs, ds in zip(x.split(size), d.split(size), strict=True):
            weight_gradient = ds.T @ xs
            total.addmm_(weight_gradient.T, weight_gradient)
        return total
    weighted = [(ds @ ds.T) @ xs for xs, ds in zip(x.split(size), d.split(size), strict=True)]
    return total.addmm_(x.T, torch.cat(weighted))


def _batches(windows: Sequence[Tensor], batch: int) -> Iterator[Tensor]:
    """Windows of one length, `batch` at a time: [B, T]."""
    lengths: dict[int, list[Tensor]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    for same in lengths.values():
        for start in range(0, len(same), batch):
            yield torch.stack(same[start : start + batch])


@contextlib.contextmanager
def _frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Only activations get gradients; parameters are as before at the end."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _forward(
    model: "PreTrainedModel",
    blocks: nn.ModuleList,
    tokens: Tensor,
    labels: Labels,
    generator: torch.Generator,
) -> list[_Call]:
    """Run a batch [B, T] through the model: how each block was called, and the last one's gradient.

    The loss is a sum, not a mean, over tokens: its gradients are of the size they have in a text of
    any length.
    """
    calls: list[_Call] = []
    output: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(_Call(inputs, dict(keywords)))

    def cut(_: nn.Module, __: Any, result: Any) -> Any:
        hidden = result if isinstance(result, Tensor) else result[0]
        output.append(hidden.detach().requires_grad_())
        return output[0] if isinstance(result, Tensor) else (output[0], *result[1:])

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(cut))
    try:
        with torch.enable_grad():
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            if labels == "text":
                wanted = tokens[:, 1:].flatten()
            else:
                p = logits.detach().softmax(-1)
                wanted = p.multinomial(1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
            (calls[-1].gradient,) = torch.autograd.grad(loss, output)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _backward(block: nn.Module, calls: list[_Call], sums: Sequence[_Sums]) -> None:
    """Take the last call of a batch off the list: one block forward and backward.

    The gradient at its input becomes that of the call before.
    """
    call = calls.pop()
    hidden = call.inputs[0] if call.inputs else call.keywords["hidden_states"]
    hidden = hidden.detach().requires_grad_()
    seen: list[tuple[_Sums, Tensor, Tensor]] = []
    handles = []
    for found in sums:

        def record(_: nn.Module, inputs: Any, output: Tensor, found: _Sums = found) -> None:
            seen.append((found, inputs[0].detach(), output))

        handles.append(found.module.register_forward_hook(record))
    try:
        with torch.enable_grad():
            result = _call(block, call, hidden)
            leaves = [hidden, *(output for _, _, output in seen)]
            gradients = torch.autograd.grad(result, leaves, call.gradient, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for (found, inputs, output), gradient in zip(seen, gradients[1:], strict=True):
        arrived = torch.zeros_like(output) if gradient is None else gradient
        found.add(inputs, arrived.detach(), len(hidden))
    if calls:
        calls[-1].gradient = gradients[0]


def _call(block: nn.Module, call: _Call, hidden: Tensor) -> Tensor:
    if call.inputs:
        result = block(hidden, *call.inputs[1:], **call.keywords)
    else:
        result = block(**{**call.keywords, "hidden_states": hidden})
    return result if isinstance(result, Tensor) else result[0]
