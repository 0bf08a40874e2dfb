"""The in-memory form: how packed tensors lie in GPU memory.

A row is cut into steps of 128 columns (256 at 3 bits, where four groups of codes share three
words, and at 5, where they share a fifth), a step into dots of 16 columns, the depth of one
tensor-core product. All arrays have the rows last or next to last, padded to `ROWS` per fused
shard, so a program reads whole lines.

    nibble tile   int16 [rows, 16]: four dots; code r of dot i lies in a nibble of word r (uniform)
                  or of the pair of words that holds it (tables), see `repack.pack_words`
    5 bits        four tiles of the low four bits, and a tile of fifth bits: bit 4i + 3 - t of word
                  r is that of the code in nibble i of word r of tile t
    4 bits        two tiles a step
    3 bits        three tiles a step; their spare fourth bits are a fourth tile
    2 bits        one tile a step; its nibbles hold two codes
    in place      a tile more in steps of 256 columns: bit 15 - 2t - i of word r is the class of
                  code r of dot 2i of nibble tile t, and bit 7 - 2t - i that of dot 2i + 1;
                  codes lie as uniform ones do, those of tables as well

Salient weights are few or many. A few have places of their own: position and difference to the
base weight. Many stay in place: their codes lie among the others, and the class says by which
grid a code is read, the group's or the row's.

Uniform and plain table codes keep the order of the columns. A trellis runs down one pair of
words after the other: pair w of a group of 64·J columns holds columns w·8·J … w·8·J + 8·J - 1,
so that the codes before a code are in the same registers. What comes before a pair's first code
is two bits, in the high half of `group_data`.
"""

import dataclasses
import functools
from typing import Literal

from precalib_kernels.format.layout import Layout

ROWS = 64  # rows of a tile; parts are padded to it
DOT = 16  # columns of one dot
SALIENT_CHUNK = 8  # slots of a round: products of a row's salient weights that are added up in fp16
SALIENT_UNROLL = 4  # rounds whose loads are in flight together, for few rows of x
SUBNORMAL = 2.0**-24  # fp16's smallest number; the bits of a small number of them are that number
Mode = Literal["uniform", "table", "trellis"]


@dataclasses.dataclass(frozen=True)
class TritonLayout:
    """Constants of a layout's in-memory form; what a kernel is compiled for.

    bits, group:      as in the layout.
    mode:             how codes become codebook entries.
    inline_salient:   whether salient weights stay among the base codes, with a class bit each.
    table:            codebook in memory, one byte an entry, in the order of stored codes.
    offset:           decoded fp16 value of a codebook entry of zero.
    entries_per_unit: codebook units per unit of a decoded fp16 value.
    slots:            places for salient weights in a group.
    log8:             whether scales are bytes.
    """

    bits: int
    group: int
    mode: Mode
    inline_salient: bool
    table: tuple[int, ...]
    offset: float
    entries_per_unit: float
    slots: int
    log8: bool

    @property
    def step(self) -> int:
        """Columns of one step of the main loop."""
        return 256 if self.bits in (3, 5) or self.inline_salient else 128

    @property
    def stored_tiles(self) -> int:
        """Tiles of int16 words stored for one step, classes and fifth bits included."""
        return self.step * self.bits // 256 + self.inline_salient

    @property
    def chain_tiles(self) -> int:
        """J: nibble tiles decoded together; a trellis runs through them."""
        return 2 if self.mode == "trellis" and self.group == 128 else 1

    @property
    def zero_points(self) -> bool:
        """Whether groups have a zero point."""
        return self.mode == "uniform"

    def steps(self, input_size: int) -> int:
        """Steps of a row."""
        return -(-input_size // self.step)

    def rounds(self, input_size: int) -> int:
        """Rounds of SALIENT_CHUNK that hold all slots of a row."""
        return -(-self.steps(input_size) * self.step // self.group * self.slots // SALIENT_CHUNK)

    def gathered_columns(self, input_size: int) -> int:
        """Columns that the slots of whole rounds can reach; as many as the steps have, or more."""
        if not self.slots:
            return self.steps(input_size) * self.step
        return -(-self.rounds(input_size) * SALIENT_CHUNK // self.slots) * self.group

    def bits_per_weight(self, input_size: int) -> float:
        """Bits read per weight of a long row: words and what a group has besides."""
        side = 32 + 32 * self.inline_salient
        columns = self.steps(input_size) * self.step
        words = 256 * self.stored_tiles / self.step
        return (words + (side + 24 * self.slots) / self.group) * columns / input_size


def padded(rows: int) -> int:
    """Rows of a fused shard with those that fill its last tile."""
    return -(-rows // ROWS) * ROWS


def reason_against(layout: Layout) -> str | None:
    """Why the kernels cannot take a layout, or None."""
    if layout.group_size not in (32, 64, 128):
        return f"no kernel for groups of {layout.group_size}, only 32, 64 and 128"
    if not layout.trellis:
        return None
    if layout.group_size == 32:
        return "no kernel for a trellis in groups of 32, only 64 and 128"
    entries = layout.codebook_values
    if any(entry % 2 == 0 for entry in entries) or any(
        a != -b for a, b in zip(entries, reversed(entries), strict=True)
    ):
        return "no kernel for a trellis codebook whose entries are not odd and symmetric"
    return None


def keeps_salient_inline(layout: Layout) -> bool:
    """Whether salient weights stay in place: where it can be done and takes less memory.

    It takes a bit per weight and two fp16 numbers per group, where a place takes 24 bits: from 7
    places in 128 it is less. The cost model sees fewer instructions from about 9, 6 and 3 places
    (M ≤ 8, 16, 64).
    """
    return (
        not layout.trellis
        and layout.bits in (3, 4)
        and layout.scale == "float16"
        and layout.salient_grid == "min-max"
        and layout.salient_bits == layout.bits
        and 24 * layout.salient_count > layout.group_size + 32
        and (layout.uniform or _spacing(layout.codebook_values) > 0)
    )


def _spacing(levels: tuple[int, ...]) -> int:
    """Levels per unit of seven-bit numbers that stand for them, 0 if there are none."""
    if max(levels) - min(levels) < 128:
        return 1
    return 2 if len({level % 2 for level in levels}) == 1 else 0


@functools.lru_cache(maxsize=64)
def triton_layout(layout: Layout) -> TritonLayout:
    """The form of a layout for which there is no `reason_against`.

    fp16 0x6400 + byte is 1024 + byte; bytes of a table are 128 + level. A trellis has 7-bit bytes
    63.5 + level / 2, of which bit 7 is set as well. In place a half has room for salient weights,
    too: it counts subnormal units, four to a uniform level, or a table's levels from its least one.
    """
    levels, placed = layout.codebook_values, keeps_salient_inline(layout)
    mode: Mode = "uniform" if layout.uniform else "trellis" if layout.trellis else "table"
    table: tuple[int, ...] = ()
    offset, entries_per_unit = 1024.0, 1.0
    if mode == "trellis":
        top = layout.bits - 1  # the bit of a stored code that carries u
        codes = [
            (code << 1 | code >> top) & (2**layout.bits - 1) for code in range(len(levels) // 2)
        ]
        table = tuple((levels[2 * code] + 127) // 2 for code in codes)
        offset, entries_per_unit = 1215.5, 2.0
    elif mode == "table" and placed:
        spacing = _spacing(levels)
        table = tuple((level - min(levels)) // spacing for level in levels)
        offset, entries_per_unit = -min(levels) / spacing * SUBNORMAL, spacing / SUBNORMAL
    elif mode == "table":
        table, offset = tuple(level + 128 for level in levels), 1152.0
    elif placed:
        offset, entries_per_unit = 0.0, 1 / (4 * SUBNORMAL)
    return TritonLayout(
        layout.bits, layout.group_size, mode, placed, table, offset, entries_per_unit,
        0 if placed else layout.salient_count, layout.scale == "log8",
    )  # fmt: skip
