"""From the tensors of a checkpoint to the memory layout of `memory_layout.py`."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from precalib_kernels.backends.x86.huge_pages import WEIGHTS, HugePageArena
from precalib_kernels.backends.x86.memory_layout import LANES, ROW_VALUES, VECTOR, X86Layout
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import COLUMN_UNIT, Layout

CHUNK_WEIGHTS = 1 << 22  # weights packed at a time: their float32 and index forms are large
SEGMENTS = 4
STEPS = 8


def high_planes(high: Tensor, bits: int) -> list[Tensor]:
    """The bits above the lowest, [8, ...] to bits - 1 planes, as `high_bits` in decode.h reads."""
    planes = [torch.zeros_like(high[0]) for _ in range(bits - 1)]
    if bits == 4:
        for i in range(6):
            planes[i // 2] |= high[i] << 3 * (i % 2)
        for i in (6, 7):
            planes[i - 6] |= (high[i] & 3) << 6
            planes[2] |= high[i] >> 2 << i
        return planes
    width = bits - 1
    per_plane = STEPS // width
    for i in range(STEPS):
        planes[i // per_plane] |= high[i] << width * (i % per_plane)
    return planes


HighPlanes = Callable[[Tensor, int], list[Tensor]]


def repack(
    tensors: Mapping[str, Tensor],
    x86: X86Layout,
    where: str,
    arena: HugePageArena = WEIGHTS,
    planes_of: HighPlanes = high_planes,
) -> Tensor:
    """The tensors of a weight as one tensor in the memory layout, uint8 [x86.nbytes].

    tensors:   as named by `Layout.tensors`; column_scale has a row per shard.
    where:     begins the text of a FormatError about damaged positions.
    arena:     where its memory comes from.
    planes_of: which planes the high bits of codes go to; Arm has an order of its own.
    """
    packed = arena.zeros(x86.nbytes)
    metadata_start, row_start, column_start, _ = x86.offsets
    planes = packed[:metadata_start].view(x86.blocks, x86.block_bytes)
    metadata_size = x86.blocks * x86.groups * x86.metadata_bytes
    metadata = packed[metadata_start:][:metadata_size].view(
        x86.blocks, x86.groups, x86.metadata_bytes
    )
    rows = packed[row_start:column_start].view(torch.float32).view(x86.blocks, ROW_VALUES, LANES)
    for first, chunk in _blocks_of_rows(tensors, x86):
        count = chunk["qweight"].shape[0] // LANES
        blocks = slice(first, first + count)
        codes = unpack_bits(chunk["qweight"], x86.layout.bits, x86.columns)
        planes[blocks] = pack_codes(codes, x86, planes_of)
        metadata[blocks] = _group_metadata(chunk, codes, x86, where)
        rows[blocks] = _row_values(chunk, x86.layout).view(-1, count, LANES).transpose(0, 1)
    if x86.layout.column_scale:
        scale = tensors["column_scale"].contiguous().view(torch.uint8).flatten()
        packed[column_start:][: scale.numel()] = scale
    return packed


def pack_codes(codes: Tensor, x86: X86Layout, planes_of: HighPlanes = high_planes) -> Tensor:
    """Codes in the order of the kernels, uint8 [blocks, bytes].

    codes:     uint8 [16 * blocks, K].
    planes_of: as `repack` takes it.
    """
    layout = x86.layout
    columns = codes.shape[1]
    whole = columns // layout.group_size * layout.group_size
    pieces = []
    for first, last in ((0, whole), (whole, columns)):
        if first < last:
            size = min(layout.group_size, last - first)
            grouped = codes[:, first:last].reshape(-1, LANES, (last - first) // size, size)
            if x86.has_nibbles:
                packed = _nibbles(grouped, layout)
            else:
                packed = _bit_planes(grouped, layout.bits, planes_of)
            pieces.append(packed.flatten(1))
    return torch.cat(pieces, 1)


def _by_step(codes: Tensor) -> Tensor:
    """Codes [blocks, 16, groups, size] to [step, block, group, chunk, byte].

    A byte is a row's segment.
    """
    blocks, _, groups, size = codes.shape
    chunks = size // COLUMN_UNIT
    steps = codes.view(blocks, LANES, groups, SEGMENTS, chunks, STEPS)
    return steps.permute(5, 0, 2, 4, 1, 3).reshape(STEPS, blocks, groups, chunks, VECTOR)


def _bit_planes(codes: Tensor, bits: int, planes_of: HighPlanes) -> Tensor:
    """Codes [blocks, 16, groups, size] to [blocks, groups, planes * 64], as `decode.h` has it."""
    step = _by_step(codes)
    low = torch.zeros_like(step[0])
    for i in range(STEPS):
        low |= (step[i] & 1) << i
    high = torch.stack(planes_of(step >> 1, bits), 3)
    return torch.cat([low.flatten(2), high.flatten(2)], 2)


def _nibbles(codes: Tensor, layout: Layout) -> Tensor:
    """Codes of 3 or 4 bits [blocks, 16, groups, size] to bytes, as `shuffle_levels.h` has it."""
    low = codes & 1
    if layout.trellis:  # of the code before, and of the last before the first
        low = low.roll(1, 3)
    step = _by_step(codes >> 1 | low << 3)
    vectors = [step[i] | step[i + 1] << 4 for i in range(0, STEPS, 2)]
    if layout.bits == 3:  # the last in the bits that the others do not use
        *vectors, last = vectors
        for vector, bit in zip(vectors, (0, 1, 3), strict=True):
            vector |= (last >> bit & 0x11) << 2
    return torch.stack(vectors, 3).flatten(2)


def _group_metadata(
    tensors: Mapping[str, Tensor], codes: Tensor, x86: X86Layout, where: str
) -> Tensor:
    """Scales, zeros and salient weights, uint8 [blocks, groups, metadata_bytes]."""
    pieces = [tensors["scales"]]
    if x86.layout.uniform:
        pieces.append(tensors["zeros"])
    if x86.layout.salient_count:
        slots = _salient(tensors, codes, x86, where)
        pieces += [part[..., j] for j in range(x86.layout.salient_count) for part in slots]
    return torch.cat([_by_block(piece) for piece in pieces], 2)


def _by_block(per_group: Tensor) -> Tensor:
    """[rows, groups] to bytes [blocks, groups, 16 * size]."""
    rows, groups = per_group.shape
    blocked = per_group.view(rows // LANES, LANES, groups).transpose(1, 2).contiguous()
    return blocked.view(torch.uint8)


def _salient(
    tensors: Mapping[str, Tensor], codes: Tensor, x86: X86Layout, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Position 4 * step + segment in the group, salient code, codebook entry of the base.

    returns: uint8 (positions of large groups int16) [rows, groups, slots].
    """
    layout, columns = x86.layout, x86.columns
    column, salient = reference.salient_codes(tensors, layout, columns, where)
    used = column < columns
    column = torch.where(used, column, 0)
    start = column // layout.group_size * layout.group_size
    segment = (columns - start).clamp(max=layout.group_size) // SEGMENTS
    place = column - start
    index = reference.codebook_index(codes, layout).gather(1, column)
    entry = torch.tensor(layout.codebook_values, dtype=torch.int8)[index.int()]
    if layout.salient_grid == "sign-magnitude":  # the sign as bit 7, whatever the width
        top = 2 ** (layout.salient_bits - 1)
        salient = salient % top | (salient // top) << 7
    shape = column.shape[0], x86.groups, layout.salient_count
    place = place % segment * SEGMENTS + place // segment
    kind = torch.uint8 if x86.position_bytes == 1 else torch.int16
    return (
        torch.where(used, place, x86.no_position).to(kind).view(shape),
        salient.view(shape),
        entry.view(shape),
    )


def _row_values(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Factor of scales, salient step and offset, float32 [3, rows]."""
    rows = tensors["qweight"].shape[0]
    factor, step, offset = torch.zeros(ROW_VALUES, rows, dtype=torch.float32)
    if layout.scale == "float16":
        factor += 1 / layout.codebook_limit
    else:
        row_scale = tensors["row_scale"].float().flatten()
        factor = row_scale / layout.codebook_limit
    if layout.salient_count and layout.salient_grid == "row":
        half = 2 ** (layout.salient_bits - 1)
        step = row_scale / (half - 1)
        offset = -half * step
    elif layout.salient_count:
        step = tensors["salient_scale"].float().flatten()
        offset = tensors["salient_offset"].float().flatten()
    return torch.stack([factor, step, offset])


def _blocks_of_rows(
    tensors: Mapping[str, Tensor], x86: X86Layout
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """A few whole blocks at a time, a shard's last one padded: first block and its tensors."""
    step = max(1, CHUNK_WEIGHTS // (x86.columns * LANES)) * LANES
    block = start = 0
    for size in x86.shard_sizes:
        for first in range(0, size, step):
            count = min(step, size - first)
            rows = slice(start + first, start + first + count)
            yield (
                block,
                {
                    name: torch.nn.functional.pad(tensor[rows], (0, 0, 0, -count % LANES))
                    for name, tensor in tensors.items()
                    if name != "column_scale"
                },
            )
            block += -(-count // LANES)
        start += size
