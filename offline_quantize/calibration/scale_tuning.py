"""Row and column scales tuned by gradient, on the KL divergence to the original.

Codes stay as they are. A packed weight Ŵ [N, K] has one factor per row and one per column in
float16; each gets a factor near 1 that Adam (arXiv 1412.6980) finds. Trained on text that the
original wrote itself, the KL is what the two models differ by as writers of text.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 1e-3  # of Adam, at its largest
Report = Callable[[int, int, float], None]  # steps done, steps in all, KL before the last one
WARM_UP = 0.1  # share of the steps in which the rate rises; it falls as a cosine after


@dataclasses.dataclass(frozen=True)
class Factors:
    """What to multiply scales by: row, float32 [N], and column, float32 [K]."""

    row: Tensor
    column: Tensor


class ScaledLinear(nn.Module):
    """A frozen linear layer with a factor for each row and each column of its weight."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        rows, columns = frozen.weight.shape
        self.row = nn.Parameter(torch.ones(rows, device=frozen.weight.device))
        self.column = nn.Parameter(torch.ones(columns, device=frozen.weight.device))

    @property
    def weight(self) -> Tensor:
        """Of the layer; some models look at its type."""
        return self.frozen.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        return self.frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]; the factors are applied in float32."""
        y = nn.functional.linear((x * self.column).to(x.dtype), self.frozen.weight)
        y = (y * self.row).to(x.dtype)
        return y if self.frozen.bias is None else y + self.frozen.bias


def tune_factors(
    original: "PreTrainedModel",
    quantized: "PreTrainedModel",
    modules: Sequence[str],
    windows: Sequence[Tensor],
    *,
    epochs: int = 1,
    rows_alone: Collection[str] = (),
    batch: int = 1,
    rate: float | Mapping[str, float] = RATE,
    seed: int = 0,
    report: Report = lambda _done, _steps, _kl: None,
) -> dict[str, Factors]:
    """The factors of the modules at the end of training, by name.

    quantized: has the dequantized weights; it is as before at the end.
    windows:   text, int64 [T] each, all of one length; in a new order in each epoch.
    rows_alone: modules whose columns keep a factor of 1.
    batch:     windows of one step.
    rate:      of Adam at its largest, for all modules or for each.
    report:    is told of every step.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.stack(list(windows))
    steps = epochs * math.ceil(len(text) / batch)
    with _frozen(original, quantized), _scaled(quantized, modules) as layers:
        for name in rows_alone:
            layers[name].column.requires_grad_(False)
        groups = [
            {
                "params": [layer.row, layer.column],
                "lr": rate[name] if isinstance(rate, Mapping) else rate,
            }
            for name, layer in layers.items()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        done = 0
        for _ in range(epochs):
            for chosen in torch.randperm(len(text), generator=generator).split(batch):
                tokens = text[chosen].to(quantized.device)
                with torch.enable_grad():
                    loss = divergence(original, quantized, tokens)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
                report(done, steps, float(loss.detach()))
        return {
            name: Factors(layer.row.detach(), layer.column.detach())
            for name, layer in layers.items()
        }


def divergence(original: "PreTrainedModel", quantized: "PreTrainedModel", tokens: Tensor) -> Tensor:
    """Mean KL(original ‖ quantized) of the next-token distributions of [B, T] tokens, in nats."""
    with torch.no_grad():
        log_p = original(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    log_q = quantized(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    kl: Tensor = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    mean: Tensor = kl / log_q[..., 0].numel()
    return mean


def _rate(step: int, steps: int) -> float:
    """Share of the largest rate."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextlib.contextmanager
def _frozen(*models: "PreTrainedModel") -> Iterator[None]:
    """No parameter of the models gets a gradient; afterwards as before."""
    before = [(p, p.requires_grad) for model in models for p in model.parameters()]
    for model in models:
        model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def _scaled(
    model: "PreTrainedModel", modules: Sequence[str]
) -> Iterator[Mapping[str, ScaledLinear]]:
    """The modules as scaled layers; afterwards as before."""
    before = {name: model.get_submodule(name) for name in modules}
    layers = {name: ScaledLinear(module) for name, module in before.items()}  # type: ignore[arg-type]
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield layers
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
