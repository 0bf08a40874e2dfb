"""What learning a value–output transform makes small: stand-ins for what quantizing will lose.

A proxy is a differentiable function of a pair W_v [G·d, K], W_o [N, G·q·d] of G KV heads, both
float32; its value is a scalar.

`LogSumExp` is CafeQ's (arXiv 2511.19705): the steps of a plain grid are as wide as the largest
weight that shares its scale, so the largest of those should be small. `ExpectedError` predicts the
error of the product W_o·W_v under given recipes, column scale and salient weights included.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import in_groups
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.value_output import output_heads

LEAST = 1e-20  # mean squares below it count as zeros


class Proxy(Protocol):
    """A differentiable measure of a pair; `heads` is the number G of its KV heads."""

    def __call__(self, value: Tensor, output: Tensor, heads: int) -> Tensor:
        """The measure, a scalar; less is better."""


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """Smooth maximum log Σ exp(t·a) / t of the largest magnitudes a of all groups of both weights.

    Magnitudes are divided by `units`, so that W_v and W_o count alike.

    group_size:  neighbouring weights of a row that share a scale.
    units:       root mean squares of W_v and W_o before any transform.
    temperature: t; the paper finds that it matters little.
    """

    group_size: int
    units: tuple[float, float]
    temperature: float = 5.0

    @classmethod
    def of(cls, value: Tensor, output: Tensor, group_size: int) -> "LogSumExp":
        """The proxy for a pair that is not transformed yet."""
        rms = [float(weight.float().square().mean().sqrt()) or 1.0 for weight in (value, output)]
        return cls(group_size, (rms[0], rms[1]))

    def __call__(self, value: Tensor, output: Tensor, heads: int) -> Tensor:  # noqa: ARG002
        """The measure, in root mean squares."""
        largest = [
            in_groups(weight, self.group_size).abs().amax(-1).flatten() / unit
            for weight, unit in zip((value, output), self.units, strict=True)
        ]
        return (self.temperature * torch.cat(largest)).logsumexp(0) / self.temperature


@dataclasses.dataclass(frozen=True)
class ExpectedError:
    """log E‖W_o·W_v − Ŵ_o·Ŵ_v‖² if errors of single weights are independent.

    The error of a weight gets the variance 4**-bits · s² · t², with s the scale of its group as the
    encoder will choose it (the largest non-salient weight; half the span of a min-max grid) and t
    its column scale; salient weights count as exact. An error in row i of W_v reaches the product
    times ‖column i of W_o‖, one in column i of W_o times ‖row i of W_v‖.

    value_recipe, output_recipe: how the two will be quantized.
    inputs: float32 [K], mean square of each input of W_v; None if they are alike.
    """

    value_recipe: Recipe
    output_recipe: Recipe
    inputs: Tensor | None = None

    def __call__(self, value: Tensor, output: Tensor, heads: int) -> Tensor:
        """The measure, the logarithm of a squared error."""
        inputs = value.new_ones(value.shape[1]) if self.inputs is None else self.inputs
        size = len(value) // heads
        value_errors = ExpectedErrors.of(value, self.value_recipe).of_rows(inputs)
        output_errors = ExpectedErrors.of(output, self.output_recipe).of_columns()
        read = output_heads(output.square().sum(0, keepdim=True), heads, size).sum(1)
        arriving = output_heads(output_errors[None], heads, size).sum(1)
        written = value.square() @ inputs
        return (value_errors @ read.flatten() + arriving.flatten() @ written).log()


@dataclasses.dataclass(frozen=True)
class ExpectedErrors:
    """Expected squared errors of the weights of [N, K] under a recipe, up to a common factor.

    variance: [N, G], of each group without its column scale.
    scale:    [K], squares of the column scale.
    """

    variance: Tensor
    scale: Tensor
    group_size: int

    @classmethod
    def of(cls, weight: Tensor, recipe: Recipe) -> "ExpectedErrors":
        """The errors to expect of a weight; differentiable."""
        layout, size = recipe.layout, recipe.layout.group_size
        scale = weight.new_ones(weight.shape[1])
        if layout.column_scale:
            scale = _column_scale(weight, recipe.sinkhorn_iterations)
            weight = weight / scale
        grouped = in_groups(weight, size)
        if layout.uniform:
            span = grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)
            step = span / 2
        else:
            step = grouped.abs().topk(layout.salient_count + 1, -1).values[..., -1]
        return cls(4.0**-layout.bits * step.square(), scale.square(), size)

    def of_rows(self, importance: Tensor) -> Tensor:
        """Sum over each row [N], columns weighted by `importance` [K]."""
        return self.variance @ in_groups((self.scale * importance)[None], self.group_size)[0].sum(1)

    def of_columns(self) -> Tensor:
        """Sum over each column [K]."""
        groups = self.variance.sum(0).repeat_interleave(self.group_size)
        return groups[: len(self.scale)] * self.scale


def _column_scale(weight: Tensor, iterations: int) -> Tensor:
    """The column scale [K] as `sinkhorn.column_scale` finds it, differentiable."""
    square = weight.square()
    column = square.new_ones(square.shape[1])  # 1 / factor²
    for _ in range(iterations):
        row = 1 / (square @ column / square.shape[1]).clamp_min(LEAST)
        column = 1 / (row @ square / square.shape[0]).clamp_min(LEAST)
    factor = column.rsqrt()
    return factor / factor.log().mean().exp()
