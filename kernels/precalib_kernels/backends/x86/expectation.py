"""What a product of the kernels takes, relative to the product of unquantized weights.

Times are from `benchmarks/results/cpu-products.md`: `balanced-4`, K = N = 4096, one thread. ISAs
below `avx512_bf16` were measured on a machine limited to them. Of several processors measured with
today's kernels, each ratio is the largest.
"""

import dataclasses
from collections.abc import Mapping

import torch

SLOWER = 1.1  # a ratio above that is said to be slower; below it is within what runs differ by
BATCH_SIZES = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Measured times of one ISA.

    dense:  the type in which backend `dense` multiplies on such a processor.
    ratios: time over that of `dense`, by batch size M, for activations in 16 bits.
    """

    dense: str
    ratios: Mapping[int, float]

    def sentence(self, isa: str) -> str:
        """For a log line and for `precalib doctor`."""
        sizes = sorted(self.ratios)
        slower = [m for m in sizes if self.ratios[m] > SLOWER]
        ratios = ", ".join(f"{self.ratios[m]:.2f}".removeprefix("0") for m in sizes)
        text = (
            f"ISA {isa}: about {ratios} times the time of unquantized {self.dense} products at "
            f"M = {', '.join(map(str, sizes))}"
        )
        return f"{text}; slower at M = {', '.join(map(str, slower))}" if slower else text


def _expectation(dense: str, *ratios: float) -> Expectation:
    return Expectation(dense, dict(zip(BATCH_SIZES, ratios, strict=True)))


EXPECTATIONS: Mapping[str, Expectation] = {
    "avx2": _expectation("float32", 0.23, 0.28, 0.38, 0.55, 0.62),
    "avx_vnni": _expectation("float32", 0.18, 0.22, 0.34, 0.48, 0.55),
    "avx512": _expectation("float32", 0.14, 0.19, 0.23, 0.33, 0.36),
    "avx512_vnni": _expectation("float32", 0.10, 0.10, 0.18, 0.39, 0.61),
    "avx512_bf16": _expectation("bfloat16", 0.27, 0.70, 0.90, 1.07, 1.07),
    "amx": _expectation("bfloat16", 0.19, 0.38, 0.48, 0.84, 0.78),
}


def expectation(isa: str, dtype: torch.dtype) -> str | None:
    """A sentence about products on `isa`; None for types that were not measured."""
    return None if dtype == torch.float32 else EXPECTATIONS[isa].sentence(isa)
