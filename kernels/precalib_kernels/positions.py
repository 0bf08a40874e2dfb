"""Which weights of a group are salient, stored as one number: the rank of the chosen set.

A set p_1 < p_2 < … < p_j of at most m positions below g has the rank

    sum(C(g, i), i < j)  +  C(p_1, 1) + C(p_2, 2) + … + C(p_j, j)

(the combinatorial number system, sets ordered by size first). It is the shortest fixed-width
code there is, lets a group have fewer than m salient weights, and cannot name a position twice.

Ranks can exceed 63 bits (16 of 128 need 67), so they are held as limbs of 56 bits: seven bytes
each, and a sum of 33 limbs still fits an int64.
"""

import functools
import math

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError
from precalib_kernels.layout import Layout

LIMB_BYTES = 7
LIMB_MASK = (1 << 8 * LIMB_BYTES) - 1


def pack_positions(positions: Tensor, layout: Layout) -> Tensor:
    """Rank of every group's set of salient weights.

    positions: integer [N, G, salient_count], group-local and ascending; unused slots hold -1,
               after the used ones.
    returns:   uint8 [N, G * layout.position_bytes], little-endian.
    """
    rows, groups, count = positions.shape
    binomials, offsets = _tables(layout, positions.device)
    used = positions >= 0
    order = torch.arange(1, count + 1, device=positions.device)  # i of p_i
    rank = offsets[:, used.sum(-1)]  # [limbs, N, G]
    for limb in range(rank.shape[0]):
        terms = binomials[limb][order, positions.clamp(min=0).long()]
        rank[limb] += terms.mul_(used).sum(-1)
    for limb in range(rank.shape[0] - 1):
        rank[limb + 1] += rank[limb] >> 8 * LIMB_BYTES
        rank[limb] &= LIMB_MASK
    shifts = 8 * torch.arange(LIMB_BYTES, device=positions.device)
    limb_bytes = (rank[..., None] >> shifts) & 0xFF  # [limbs, N, G, 7]
    joined = limb_bytes.permute(1, 2, 0, 3).reshape(rows, groups, -1)
    return joined[..., : layout.position_bytes].to(torch.uint8).reshape(rows, -1)


def unpack_positions(packed: Tensor, layout: Layout, input_size: int, where: str) -> Tensor:
    """Positions of the salient weights of every group, ascending.

    packed:  uint8 [N, G * layout.position_bytes].
    returns: int16 [N, G, salient_count], group-local; unused slots hold -1, after the used ones.

    Raises FormatError that begins with `where` if a rank names no set, or a position lies past
    the end of a ragged group.
    """
    rows, groups, count = packed.shape[0], layout.groups(input_size), layout.salient_count
    binomials, offsets = _tables(layout, packed.device)
    limbs = binomials.shape[0]
    grouped = packed.view(rows * groups, layout.position_bytes)
    padded = torch.nn.functional.pad(grouped, (0, limbs * LIMB_BYTES - layout.position_bytes))
    shifts = 8 * torch.arange(LIMB_BYTES, device=packed.device)
    rank = (padded.view(-1, limbs, LIMB_BYTES).long() << shifts).sum(-1).T.contiguous()

    used = torch.zeros_like(rank[0])
    for size in range(1, count + 1):
        used += _at_least(rank, offsets[:, size, None])
    rank = _subtract(rank, offsets[:, used])

    positions = torch.full((count, rows * groups), -1, dtype=torch.int16, device=packed.device)
    top = 1 << (layout.group_size - 1).bit_length()
    for i in range(count, 0, -1):
        table = binomials[:, i]  # C(p, i), ascending in p
        position, step = torch.zeros_like(used), top
        while step := step // 2:  # the largest position whose term still fits
            tried = (position + step).clamp_(max=layout.group_size - 1)
            position = torch.where(_at_least(rank, table[:, tried]), tried, position)
        filled = i <= used
        positions[i - 1] = torch.where(filled, position, -1).to(torch.int16)
        rank = _subtract(rank, table[:, position] * filled)

    last = input_size - (groups - 1) * layout.group_size
    result = positions.T.reshape(rows, groups, count)
    if bool(rank.any()) or bool((result[:, -1] >= last).any()):
        raise FormatError(
            f"{where}: 'salient_positions' names a weight outside its group; "
            "the checkpoint is damaged, quantize the model again"
        )
    return result


@functools.lru_cache(maxsize=32)
def _tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """C(p, i) as [limbs, m+1, g] and the first rank of each set size as [limbs, m+1]."""
    group, count = layout.group_size, layout.salient_count
    limbs = -(-layout.position_bytes // LIMB_BYTES)
    binomials = [[math.comb(p, i) if i else 0 for p in range(group)] for i in range(count + 1)]
    offsets = [sum(math.comb(group, j) for j in range(i)) for i in range(count + 1)]

    def split(value: int, limb: int) -> int:
        return (value >> 8 * LIMB_BYTES * limb) & LIMB_MASK

    return (
        torch.tensor(
            [[[split(v, limb) for v in row] for row in binomials] for limb in range(limbs)],
            device=device,
        ),
        torch.tensor([[split(v, limb) for v in offsets] for limb in range(limbs)], device=device),
    )


def _at_least(left: Tensor, right: Tensor) -> Tensor:
    """left >= right for numbers held as limbs in the first dimension, lowest first."""
    result = left[0] >= right[0]
    for low, high in zip(left[1:], right[1:], strict=True):
        result = (low > high) | ((low == high) & result)
    return result


def _subtract(left: Tensor, right: Tensor) -> Tensor:
    """left - right for limbed numbers with left >= right."""
    result = left - right
    for limb in range(result.shape[0] - 1):
        borrow = (result[limb] < 0).long()
        result[limb] += borrow << 8 * LIMB_BYTES
        result[limb + 1] -= borrow
    return result
