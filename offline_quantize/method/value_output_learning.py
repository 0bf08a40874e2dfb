"""Learning a value–output transform: descent on a proxy, from the weights alone.

The matrix of a KV head is the Cayley transform M = (I − A)(I + A)⁻¹ of a free matrix A. A skew A
gives a rotation and any other A an invertible matrix; M⁻¹ is the Cayley transform of −A. The paper
(CafeQ, arXiv 2511.19705) learns an arbitrary matrix; starting it from the learned rotation keeps it
well conditioned.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from offline_quantize.method.value_output import (
    from_output_heads,
    output_heads,
    transform_output,
    transform_value,
    value_heads,
)
from offline_quantize.method.value_output_proxies import Proxy

MatrixKind = Literal["orthogonal", "invertible"]
STEPS = 300
RATE = 0.08  # over √d: .01 for heads of size 64, .005 for 256; the paper uses .001 to .01


@dataclasses.dataclass(frozen=True)
class LearnedTransform:
    """Matrices [G, d, d], float32, and the proxy before and after."""

    matrices: Tensor
    before: float
    after: float


def learn(
    value: Tensor,
    output: Tensor,
    heads: int,
    proxy: Proxy,
    kind: MatrixKind = "orthogonal",
    steps: int = STEPS,
    rate: float = RATE,
    rotation: LearnedTransform | None = None,
) -> LearnedTransform:
    """The matrices of a pair that make a proxy smallest, or the identity if none is better.

    value:  W_v [G·d, K];  output: W_o [N, G·q·d], any float type, on one device.
    heads:  number G of KV heads.
    kind:   "invertible" learns a rotation first, and then an invertible matrix from there.
    steps:  of Adam, for each of the two.
    rate:   of the first step, times √d; it falls to zero by a cosine.
    rotation: what "orthogonal" gave for the same pair and proxy, if that is known.

    It starts from the identity and draws nothing at random.
    """
    value, output = value.float(), output.float()
    if rotation is None:
        size = len(value) // heads
        identity = torch.eye(size, device=value.device).repeat(heads, 1, 1)
        with torch.no_grad():
            before = float(proxy(value, output, heads))
        start = LearnedTransform(identity, before, before)
        rotation = _descend(value, output, proxy, start, True, steps, rate)
    if kind == "orthogonal":
        return rotation
    return _descend(value, output, proxy, rotation, False, steps, rate)


def cayley(free: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ of matrices A [G, d, d]: a rotation if A is skew."""
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    found: Tensor = torch.linalg.solve_ex(identity + free, identity - free, left=False).result
    return found


def _descend(
    value: Tensor,
    output: Tensor,
    proxy: Proxy,
    start: LearnedTransform,
    skew: bool,
    steps: int,
    rate: float,
) -> LearnedTransform:
    """Adam on A, from where `start` ends; the best matrices met on the way."""
    heads, size = start.matrices.shape[:2]
    value = value_heads(transform_value(value, start.matrices), heads)
    rows = len(output)
    output = output_heads(transform_output(output, start.matrices), heads, size)
    free = torch.zeros_like(start.matrices, requires_grad=True)
    rate /= math.sqrt(size)
    adam = torch.optim.Adam([free], lr=rate)
    lowest, found = start.after, None
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = (free - free.mT) / 2 if skew else free
        matrices, inverse = cayley(chosen), cayley(-chosen)
        loss = proxy(
            (matrices @ value).flatten(0, 1), from_output_heads(output @ inverse, rows), heads
        )
        reached = float(loss.detach())
        if not math.isfinite(reached):  # too large or too small for float32, or a singular matrix
            break
        if reached < lowest:
            lowest, found = reached, matrices.detach()
        adam.zero_grad()
        loss.backward()
        adam.step()
    if found is None:
        return start
    whole = (found.double() @ start.matrices.double()).float()
    return LearnedTransform(whole, start.before, lowest)
