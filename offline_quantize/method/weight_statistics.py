"""What quantizing a tensor did to its weights: error, histograms, information."""

from typing import Any

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import power_of_two

BINS = 256
ERROR_TOLERANCE = 1e-3  # relative: sums are taken in another order than while quantizing


def errors_agree(one: float, other: float) -> bool:
    """Whether two relative errors of one weight differ by no more than the order of sums can."""
    return abs(one - other) <= ERROR_TOLERANCE * max(one, other, 1e-9)


def relative_error(original: Tensor, quantized: Tensor) -> float:
    """‖W − Ŵ‖² / ‖W‖² of float32 tensors of any one shape; 0 for an original of zeros alone.

    Weights of any size are measured: squares neither underflow nor overflow.
    """
    if not original.numel():
        return 0.0
    unit = power_of_two(float(original.abs().max()))
    signal, noise = _squares(original * unit, quantized * unit)
    return noise / signal if signal else 0.0


class Statistics:
    """What happened to one weight, added up over its blocks of rows.

    largest: the largest original magnitude. Histograms have 256 equal bins over ± it.
    device:  of the blocks.
    histograms: whether to make them; without them there is no `summary`.
    """

    def __init__(self, largest: float, device: torch.device, histograms: bool = True) -> None:
        self.largest = largest
        self.histograms = histograms
        self.unit = power_of_two(largest)  # without it squares underflow or overflow
        self.width = 2 * largest * self.unit / BINS
        self.weights = 0
        self.salient = 0
        self.overflow = 0
        self.signal = 0.0
        self.noise = 0.0
        self.before = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.after = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, original: Tensor, quantized: Tensor, salient: int, overflow: int) -> None:
        """Take in one block of rows and its quantized values, both float32 [R, K]."""
        self.weights += original.numel()
        self.salient += salient
        self.overflow += overflow
        original, quantized = original * self.unit, quantized * self.unit
        signal, noise = _squares(original, quantized)
        self.signal += signal
        self.noise += noise
        if self.histograms:
            self.before += self._histogram(original)
            self.after += self._histogram(quantized)

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖² / ‖W‖²; 0 for an original of zeros alone."""
        return self.noise / self.signal if self.signal else 0.0

    def summary(self) -> dict[str, Any]:
        """relative_error: ‖W − Ŵ‖² / ‖W‖².  kl: KL(original ‖ quantized) of the histograms, in
        nats, both smoothed by half a weight per bin.  entropy_before, entropy_after: Shannon
        entropy of the histograms, in bits.  salient_share; salient_overflow: weights above λ'
        that found no slot in their group and were quantized like non-salient ones.
        """
        return {
            "relative_error": self.relative_error,
            "kl": _divergence(self.before, self.after),
            "entropy_before": _entropy(self.before),
            "entropy_after": _entropy(self.after),
            "salient_share": self.salient / self.weights,
            "salient_overflow": self.overflow,
        }

    def _histogram(self, values: Tensor) -> Tensor:
        index = values / self.width if self.width else values
        index = index.floor().add_(BINS // 2).clamp_(0, BINS - 1)
        return torch.bincount(index.int().flatten(), minlength=BINS)


def _squares(original: Tensor, quantized: Tensor) -> tuple[float, float]:
    """‖W‖² and ‖W − Ŵ‖²."""
    return float(original.square().sum()), float((original - quantized).square_().sum())


def _entropy(counts: Tensor) -> float:
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum())


def _divergence(before: Tensor, after: Tensor) -> float:
    p, q = before.double() + 0.5, after.double() + 0.5
    p, q = p / p.sum(), q / q.sum()
    return max(float((p * (p / q).log()).sum()), 0.0)
