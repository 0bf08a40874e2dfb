"""Which weights of a group are salient, and the high bits of their codes, as one number per group.

A set p_1 < p_2 < … < p_j of at most m positions below g has the rank

    sum(C(g, i), i < j)  +  C(p_1, 1) + C(p_2, 2) + … + C(p_j, j)

(the combinatorial number system, sets ordered by size first). It is the shortest fixed-width
code there is, lets a group have fewer than m salient weights, and cannot name a position twice.
The bits above the rank hold, for p_1, p_2, … in turn, the salient code without its low `bits`.

Ranks can exceed 63 bits (16 of 128 need 67), so they are held as limbs of 56 bits: seven bytes
each, and a sum of 33 limbs still fits an int64. Where a limb holds the whole number, as with all
recipes that have bits above the rank, no stream of single bits is made.
"""

import functools
import math

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError
from precalib_kernels.format.bitstream import pack_bits, unpack_bits
from precalib_kernels.format.layout import Layout

LIMB_BYTES = 7
LIMB_MASK = (1 << 8 * LIMB_BYTES) - 1


def pack_salient(positions: Tensor, high: Tensor, layout: Layout) -> Tensor:
    """The `salient` tensor.

    positions: integer [N, G, salient_count], group-local and ascending; unused slots hold -1,
               after the used ones.
    high:      uint8 [N, G, salient_count], salient codes shifted right by `bits`; unused slots 0.
    returns:   uint8 [N, G * layout.salient_bytes].
    """
    rank = _rank(positions, layout)  # [limbs, N, G]
    shifts = 8 * torch.arange(LIMB_BYTES, device=positions.device)
    if layout.salient_bytes <= LIMB_BYTES:
        number = rank[0] + (high.long() << _high_shifts(layout, high.device)).sum(-1)
        return (number[..., None] >> shifts[: layout.salient_bytes]).to(torch.uint8).flatten(1)
    rank_bytes = (rank[..., None] >> shifts).to(torch.uint8).permute(1, 2, 0, 3).flatten(2)
    if not (extra := layout.salient_bits - layout.bits):
        return rank_bytes[..., : layout.salient_bytes].flatten(1)
    rank_stream = unpack_bits(rank_bytes, 1, 8 * rank_bytes.shape[-1])[..., : layout.rank_bits]
    high_stream = unpack_bits(pack_bits(high, extra), 1, extra * layout.salient_count)
    return pack_bits(torch.cat([rank_stream, high_stream], -1), 1).flatten(1)


def unpack_salient(
    packed: Tensor, layout: Layout, input_size: int, where: str
) -> tuple[Tensor, Tensor]:
    """Positions of the salient weights and the high bits of their codes.

    packed:  uint8 [N, G * layout.salient_bytes].
    returns: int16 and uint8 [N, G, salient_count], as `pack_salient` takes them.

    Raises FormatError that begins with `where` if a rank names no set, or a position lies past
    the end of a ragged group.
    """
    rows, groups = packed.shape[0], layout.groups(input_size)
    grouped = packed.view(rows, groups, layout.salient_bytes)
    extra = layout.salient_bits - layout.bits
    if extra and layout.salient_bytes <= LIMB_BYTES:
        shifts = 8 * torch.arange(layout.salient_bytes, device=packed.device)
        number = (grouped.long() << shifts).sum(-1)
        codes = number[..., None] >> _high_shifts(layout, packed.device)
        high = (codes & (1 << extra) - 1).to(torch.uint8)
        rank = (number & (1 << layout.rank_bits) - 1).view(1, -1)
    elif extra:
        stream = unpack_bits(grouped, 1, 8 * layout.salient_bytes)
        high_stream = stream[..., layout.rank_bits :][..., : extra * layout.salient_count]
        high = unpack_bits(pack_bits(high_stream, 1), extra, layout.salient_count)
        rank = _limbs(pack_bits(stream[..., : layout.rank_bits], 1).flatten(0, 1), layout)
    else:
        high = grouped.new_zeros((rows, groups, layout.salient_count))
        rank = _limbs(grouped.flatten(0, 1), layout)
    positions, valid = _positions(rank, layout)
    result = positions.view(rows, groups, layout.salient_count)
    last = input_size - (groups - 1) * layout.group_size
    if not valid or bool((result[:, -1] >= last).any()):
        raise FormatError(
            f"{where}: 'salient' names a weight outside its group; "
            "the checkpoint is damaged, quantize the model again"
        )
    return result, high


def _rank(positions: Tensor, layout: Layout) -> Tensor:
    """Rank of each set [N, G, m] as limbs [limbs, N, G], lowest first."""
    binomials, offsets = _tables(layout, positions.device)
    used = positions >= 0
    order = torch.arange(1, positions.shape[-1] + 1, device=positions.device)  # i of p_i
    rank = offsets[:, used.sum(-1)]
    for limb in range(rank.shape[0]):
        terms = binomials[limb][order, positions.clamp(min=0).long()]
        rank[limb] += terms.mul_(used).sum(-1)
    for limb in range(rank.shape[0] - 1):
        rank[limb + 1] += rank[limb] >> 8 * LIMB_BYTES
        rank[limb] &= LIMB_MASK
    return rank


def _high_shifts(layout: Layout, device: torch.device) -> Tensor:
    """Where the high bits of each salient code begin, [m]."""
    extra = layout.salient_bits - layout.bits
    return layout.rank_bits + extra * torch.arange(layout.salient_count, device=device)


def _limbs(rank_bytes: Tensor, layout: Layout) -> Tensor:
    """Ranks given as bytes [R, any] as limbs [limbs, R], lowest first."""
    limbs = _tables(layout, rank_bytes.device)[0].shape[0]
    padded = torch.nn.functional.pad(rank_bytes, (0, limbs * LIMB_BYTES - rank_bytes.shape[1]))
    shifts = 8 * torch.arange(LIMB_BYTES, device=rank_bytes.device)
    return (padded.view(-1, limbs, LIMB_BYTES).long() << shifts).sum(-1).T.contiguous()


def _positions(rank: Tensor, layout: Layout) -> tuple[Tensor, bool]:
    """Sets [R, m] (int16) of ranks as limbs [limbs, R], and whether all ranks name one."""
    device, count = rank.device, layout.salient_count
    binomials, offsets = _tables(layout, device)
    valid = not bool(_at_least(rank, offsets[:, -1:]).any())
    used = torch.zeros_like(rank[0])
    for size in range(1, count + 1):
        used += _at_least(rank, offsets[:, size, None])
    rank = _subtract(rank, offsets[:, used])

    positions = torch.full((count, len(used)), -1, dtype=torch.int16, device=device)
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
    return positions.T, valid


@functools.lru_cache(maxsize=32)
def _tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """C(p, i) as [limbs, m+1, g], and the first rank of each set size 0 … m+1 as [limbs, m+2]."""
    group, count = layout.group_size, layout.salient_count
    limbs = max(1, -(-layout.rank_bits // (8 * LIMB_BYTES)))
    binomials = [[math.comb(p, i) if i else 0 for p in range(group)] for i in range(count + 1)]
    offsets = [sum(math.comb(group, j) for j in range(i)) for i in range(count + 2)]

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
