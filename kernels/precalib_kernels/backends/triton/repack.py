"""Packed tensors of the file to the in-memory form, once, in plain torch on any device."""

import functools
from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from precalib_kernels.backends.triton.decode_ptx import constants
from precalib_kernels.backends.triton.memory_layout import (
    DOT,
    ROWS,
    SALIENT_CHUNK,
    SUBNORMAL,
    TritonLayout,
    padded,
    triton_layout,
)
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import Layout

CHUNK_WEIGHTS = 1 << 22  # weights changed at a time; the index form takes several bytes each
VALUE_LIMIT = 4.0  # largest salient value of a row, so that eight times 2**10 fit float16
GATHER_SCALE = 32.0  # by how much `activation_kernel` divides what salient weights pick
LEAST_UNIT = 2.0**-19  # of a row's largest salient weight, in place; float16 holds the quotients


def repack(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    input_size: int,
    shard_sizes: Sequence[int],
    where: str = "packed weight",
) -> dict[str, Tensor]:
    """The arrays the kernels read; their shapes depend on the layout and the sizes only.

    tensors: as named by `Layout.tensors`; column_scale has a row per shard.

    R is the number of rows with every part padded to 64, G and K count whole steps:
    qweight [steps, tiles, R, 16] int16; group_data [G, R] int32;
    salient_positions [S / 4, R, 4] uint8 and salient_values [S / 4, R, 4] float16, S being the
    slots of whole rounds; row_unit, salient_unit [R] float32;
    column_scale [parts, K] float16; table uint8 and constants [4, 16] int16, 5 bits [6, 16],
    for the lookup; tiles [R / 64, 4] int32: part, first row of the result, rows left in the part,
    0.
    In place, salient_affine [G, R, 2] float16 stands for the three arrays salient_….

    Raises FormatError that begins with `where` for positions out of range.
    """
    form = triton_layout(layout)
    rows = [padded(size) for size in shard_sizes]
    result = _empty(form, input_size, sum(rows), tensors["qweight"].device)
    first = padded_first = 0
    tiles = []
    for part, (size, filled) in enumerate(zip(shard_sizes, rows, strict=True)):
        for row in range(0, filled, ROWS):
            tiles.append([part, first + row, max(0, size - row), 0])
        chunk = max(ROWS, CHUNK_WEIGHTS // input_size // ROWS * ROWS)
        for row in range(0, size, chunk):
            count = min(chunk, size - row)
            taken = slice(first + row, first + row + count)
            piece = {k: t[taken] for k, t in tensors.items() if k != "column_scale"}
            _fill(
                result, slice(padded_first + row, padded_first + row + count),
                piece, layout, form, input_size, where,
            )  # fmt: skip
        first, padded_first = first + size, padded_first + filled
    device = result["qweight"].device
    result["tiles"] = torch.tensor(tiles, dtype=torch.int32, device=device)
    result["table"] = torch.tensor(form.table or (0,), dtype=torch.uint8, device=device)
    words = numpy.array(constants(form), dtype=numpy.uint32).view(numpy.int16)
    result["constants"] = torch.from_numpy(words).to(device)
    if layout.column_scale:
        columns = form.steps(input_size) * form.step
        result["column_scale"] = pad(tensors["column_scale"], (0, columns - input_size))
    return result


def _empty(
    form: TritonLayout, input_size: int, rows: int, device: torch.device
) -> dict[str, Tensor]:
    steps = form.steps(input_size)
    groups = steps * form.step // form.group
    new = functools.partial(torch.zeros, device=device)
    result = {
        "qweight": new((steps, form.stored_tiles, rows, DOT), dtype=torch.int16),
        "group_data": new((groups, rows), dtype=torch.int32),
        "row_unit": new(rows, dtype=torch.float32),
    }
    if form.inline_salient:
        result["group_data"].fill_(0x3C00)  # float16's one: no scale is zero, see group_unit
        result["salient_affine"] = new((groups, rows, 2), dtype=torch.float16)
    if form.slots:
        fours = form.rounds(input_size) * SALIENT_CHUNK // 4
        result["salient_positions"] = new((fours, rows, 4), dtype=torch.uint8)
        result["salient_values"] = new((fours, rows, 4), dtype=torch.float16)
        result["salient_unit"] = new(rows, dtype=torch.float32)
    return result


def _fill(
    result: dict[str, Tensor],
    rows: slice,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    form: TritonLayout,
    input_size: int,
    where: str,
) -> None:
    columns = form.steps(input_size) * form.step
    groups = layout.groups(input_size)
    codes, salient = unpack_bits(tensors["qweight"], form.bits, input_size), None
    if form.inline_salient:
        tensors, codes, salient, affine = two_grids(tensors, codes, layout, input_size, where)
        result["salient_affine"][:groups, rows] = affine
        salient = pad(salient, (0, columns - input_size))
    fields, carry = stored_codes(pad(codes, (0, columns - input_size)), form)
    result["qweight"][:, :, rows] = pack_words(fields, form, salient)
    result["group_data"][:groups, rows] = group_data(tensors, carry, groups).T
    unit = tensors["row_scale"][:, 0].float() if form.log8 else torch.ones_like(codes[:, 0]).float()
    nothing = (tensors["scales"] == (255 if form.log8 else 0)).all(1)  # see gemm_scales.group_unit
    result["row_unit"][rows] = unit * form.entries_per_unit / layout.codebook_limit * ~nothing
    if form.slots:
        base = reference.base_values(tensors, layout, input_size)
        positions, values, salient_unit = salient_slots(tensors, base, layout, input_size, where)
        for name, slots in (("salient_positions", positions), ("salient_values", values)):
            filled = pad(slots.flatten(1), (0, 4 * len(result[name]) - slots[0].numel()))
            result[name][:, rows] = filled.view(len(filled), -1, 4).transpose(0, 1)
        result["salient_unit"][rows] = salient_unit * GATHER_SCALE


def group_data(tensors: Mapping[str, Tensor], carry: Tensor | None, groups: int) -> Tensor:
    """What the kernels need of every group in one word, int32 [N, G].

    Low half: the stored scale, a byte or a float16. High half: the zero point, or with a trellis
    what comes before the first codes. One word is loaded asynchronously, which narrower types
    cannot be, and the kernels would wait for memory in every step.
    """
    scales = tensors["scales"]
    low = scales.int() if scales.dtype == torch.uint8 else scales.view(torch.int16).int() & 0xFFFF
    if carry is not None:
        return low | carry[:, :groups].int() << 16
    return low | tensors["zeros"].int() << 16 if "zeros" in tensors else low


def stored_codes(codes: Tensor, form: TritonLayout) -> tuple[Tensor, Tensor | None]:
    """Codes as they are stored, uint8 [N, dots, 16], and the carries, int16 [N, G].

    codes: uint8 [N, K], K whole steps.
    """
    rows, columns = codes.shape
    if form.mode != "trellis":
        return codes.view(rows, columns // DOT, DOT), None
    length = 8 * form.chain_tiles  # codes of one chain; eight chains side by side make a group
    grouped = codes.view(rows, -1, form.group).int()
    low = grouped & 1
    before = pad(low, (2, 0))
    index = 2 * (grouped ^ before[..., :-2]) + before[..., 1:-1]  # reference.codebook_index
    # An odd index is the mirror image of an even one; so look up the even one, then negate.
    even = torch.where(index % 2 == 1, ~index, index) >> 1 & (2**form.bits - 1)
    top = form.bits - 1
    turned = (even & 1) << top | even >> 1
    chains = turned.view(rows, -1, 8, length)
    ends = before.unfold(-1, 2, length)[:, :, :8]  # u two and one before each chain
    # A code is stored so that it comes out by exclusive or with the two stored before it; of five
    # bits only the fifth.
    chained = 1 << top if form.bits == 5 else -1
    two, one = ends[..., 0] << top, ends[..., 1] << top
    stored = torch.empty_like(chains)
    for k in range(length):
        stored[..., k] = chains[..., k] ^ one ^ two
        two, one = one, stored[..., k] & chained
    w = torch.arange(8, device=codes.device)
    shift = w + w // 4 * 4
    at = [(first + min(form.bits, 4) - shift) % 16 for first in (23, 27)]
    carry = (ends[..., 0] << at[0] | ends[..., 1] << at[1]).sum(-1)
    carry = torch.where(carry >= 1 << 15, carry - (1 << 16), carry).to(torch.int16)
    # chain w, code 8j + n -> dot 4j + n // 2, column 2w + n % 2
    fields = stored.view(rows, -1, 8, form.chain_tiles, 4, 2).permute(0, 1, 3, 4, 2, 5)
    return fields.reshape(rows, columns // DOT, DOT).to(torch.uint8), carry


def pack_words(fields: Tensor, form: TritonLayout, salient: Tensor | None = None) -> Tensor:
    """Stored codes, uint8 [N, dots, 16], as int16 words [steps, tiles, N, 16].

    salient: bool [N, K], the classes of a form that holds them in place.
    """
    rows, dots, _ = fields.shape
    tiles = fields.view(rows, dots // 4, 4, DOT).int()
    if form.mode == "uniform" or form.inline_salient:
        nibbles = tiles.permute(0, 1, 3, 2)  # nibble i of word r: code r of dot i
    else:  # nibble 2i + h of pair w: code 2w + h of dot i
        pairs = tiles.view(rows, -1, 4, 8, 2).permute(0, 1, 3, 2, 4)
        nibbles = pairs.reshape(rows, dots // 4, DOT, 4)
    shifts = torch.arange(0, 16, 4, device=fields.device, dtype=torch.int32)
    words = ((nibbles & 15) << shifts).sum(-1).view(rows, -1, form.step // 64, DOT)
    if form.bits == 5:
        tile = torch.arange(4, device=fields.device, dtype=torch.int32)
        fifth = (nibbles >> 4 << shifts).sum(-1).view(rows, -1, 4, DOT) << (3 - tile)[:, None]
        words = torch.cat([words, fifth.sum(2, dtype=words.dtype)[:, :, None]], 2)
    elif form.bits == 2:
        words = words[:, :, :1] | words[:, :, 1:] << 2
    elif form.bits == 3:
        spare = words[:, :, 3]
        bits = torch.stack([(spare & 0x1111 << i) << 3 - i for i in range(3)], 2)
        words = words[:, :, :3] | bits
    if salient is not None:
        order = torch.arange(DOT, device=fields.device, dtype=torch.int32)
        classes = (
            salient.view(rows, -1, DOT, DOT).int() << (15 - order // 2 - order % 2 * 8)[:, None]
        )
        words = torch.cat([words, classes.sum(2, dtype=torch.int32)[:, :, None]], 2)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words)
    return words.to(torch.int16).permute(1, 2, 0, 3)


def salient_slots(
    tensors: Mapping[str, Tensor], base: Tensor, layout: Layout, input_size: int, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What salient weights add to the base: positions [N, G, m], values and their unit [N].

    A value is the salient weight minus what the base weight [N, K] has there; unused slots hold 0.
    """
    column, codes = reference.salient_codes(tensors, layout, input_size, where)
    replaced = pad(base, (0, 1)).gather(1, column)
    delta = reference.salient_grid_values(codes, tensors, layout) - replaced
    used = column < input_size
    delta = torch.where(used, delta, 0)
    unit = (delta.abs().amax(1) / VALUE_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)
    shape = column.shape[0], -1, layout.salient_count
    positions = torch.where(used, column % layout.group_size, 0).to(torch.uint8)
    values = (delta / unit[:, None]).half()
    return positions.view(shape), values.view(shape), unit


def two_grids(
    tensors: Mapping[str, Tensor], codes: Tensor, layout: Layout, input_size: int, where: str
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Weights whose salient ones stay in place: what changes, codes, classes and affine terms.

    codes: uint8 [N, K].
    affine: float16 [G, N, 2], slope and offset. A salient weight decodes to slope · h + offset in
           fp16, h being its code as even dots have it: in subnormal units, four to a code with a
           uniform codebook.

    One subnormal unit stands for a weight of one unit, which depends on the group's scale. Scales,
    and zeros, are returned in `tensors`: a unit below LEAST_UNIT times the largest salient weight
    of its row is raised to that, and base weights are rounded to what their grid has become.
    """
    form, top = triton_layout(layout), 2**layout.bits - 1
    column, _ = reference.salient_codes(tensors, layout, input_size, where)
    salient = torch.zeros((len(codes), input_size + 1), dtype=torch.bool, device=codes.device)
    salient = salient.scatter_(1, column, True)[:, :-1]
    step, first = tensors["salient_scale"].double(), tensors["salient_offset"].double()
    largest = torch.maximum(first.abs(), (first + top * step).abs()).maximum(16 * step.abs())
    of_scale = (
        form.entries_per_unit * SUBNORMAL / layout.codebook_limit
    )  # a unit over its group's scale
    least = (largest * (LEAST_UNIT / of_scale)).half().clamp(min=SUBNORMAL)  # float16's smallest
    raised = tensors["scales"].abs() < least
    scales = torch.where(raised, least, tensors["scales"])
    zeros = tensors["zeros"] if form.zero_points else torch.zeros_like(scales)
    if raised.any():
        base = reference.base_values(tensors, layout, input_size)
        zeros = torch.where(raised, zeros.clamp(max=top), zeros)
        one = reference.expand_groups(scales.float() / layout.codebook_limit, layout, input_size)
        wanted = base / one + reference.expand_groups(zeros.float(), layout, input_size)
        moved = reference.expand_groups(raised, layout, input_size) & ~salient
        entries = torch.tensor(layout.codebook_values, device=codes.device)
        nearest = (wanted[moved][:, None] - entries).abs().argmin(1)
        codes = codes.masked_scatter(moved, nearest.to(codes.dtype))
    unit = scales.double() * of_scale
    zero = form.offset / SUBNORMAL + zeros.double() / (form.entries_per_unit * SUBNORMAL)
    code = 4 if layout.uniform else 1  # what one counts in an even dot
    slope = (step / (code * unit)).half()
    middle = first + step * top / 2  # where rounding the slope does no harm
    offset = (middle / unit + zero - slope.double() * (code * top / 2)) * SUBNORMAL
    changed = {"scales": scales} | ({"zeros": zeros} if form.zero_points else {})
    return {**tensors, **changed}, codes, salient, torch.stack([slope.T, offset.half().T], -1)
