"""AdpQ by the package auto-adpq, an independent implementation of arXiv 2405.13358.

Symmetric grids and 8 % salient weights as in the paper. Stored: codes, the two float16 scales per
group, and a position of log2(group size) bits per salient weight (the package itself keeps int8
positions for as many weights as there are).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

BITS = (4, 3)
GROUP_SIZE, ALPHA, FLOAT16 = 128, 0.08, 16


def variant(bits: int) -> str:
    """Its name beside the method's."""
    return f"{bits} bits, g {GROUP_SIZE}, α {ALPHA:.0%}"


def stored_bits(weights: int, bits: int, scales: int, salient: int) -> int:
    """Of a matrix with so many weights, scales and salient weights."""
    return weights * bits + FLOAT16 * scales + math.ceil(salient * math.log2(GROUP_SIZE))


def make(bits: int, source: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Quantize the decoder: its weights by name, and the bits stored for each."""
    from auto_adpq import Auto_AdpQ
    from safetensors import safe_open

    quantizer = Auto_AdpQ(
        group_size=GROUP_SIZE, alpha=ALPHA, q_bit=bits, data_packing=False, device="cpu"
    )
    found, stored = {}, {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("_proj.weight"):
                weight = file.get_tensor(name)
                made = quantizer.AdpQ_quantize(weight.float().numpy())
                salient = int((made.outlier_indices >= 0).sum())
                stored[name] = stored_bits(weight.numel(), bits, made.scale.size, salient)
                values = torch.from_numpy(quantizer.reconstruct_weights(made).copy())
                found[name] = values.to(weight.dtype)
    return found, stored
