"""The packed form of a weight in memory, as `memory_layout.h` has it: one tensor of bytes.

Rows go in blocks of 16, one per 32-bit lane of a vector; each fused shard begins a block. For every
block there are, one after another,

| section | bytes                          | content                                             |
|---------|--------------------------------|-----------------------------------------------------|
| planes  | 64 * bits per 32 columns       | bits of the codes, see `decode.h`                   |
| side    | per group: 16 or 32            | scales, in the file's form                          |
|         | 16 with uniform levels         | zeros                                               |
|         | 48 or 64 per salient slot      | positions, codes, levels of the base                |
| rows    | 192                            | float32: factor of scales, salient step and offset  |

and in the end the column scales in float16. Sections begin on multiples of 64 bytes.
"""

import ctypes
import dataclasses

from precalib_kernels.format.layout import COLUMN_UNIT, LOG_STEPS, Layout

LANES = 16
VECTOR = 64
ROW_VALUES = 3
_FACTORS = tuple(2 ** (-i / LOG_STEPS) for i in range(LOG_STEPS))


class X86LayoutStruct(ctypes.Structure):
    """`Plan` of memory_layout.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "group_size", "groups", "part_count")),
        ("part_rows", ctypes.POINTER(ctypes.c_int64)),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("bits", "salient_count", "position_bytes", "salient_mask"),
                *("log_scales", "uniform", "column_scale", "int8_inputs"),
                *("block_bytes", "side_bytes", "side_offset", "row_offset"),
                *("column_offset", "packed_bytes"),
            )
        ),
        ("levels", ctypes.c_int8 * 128),
        ("factors", ctypes.c_float * LOG_STEPS),
    )


@dataclasses.dataclass(frozen=True)
class X86Layout:
    """Sizes and places of a packed form.

    shard_sizes: rows of the fused shards; each is padded to whole blocks.
    int8_inputs: whether products may round inputs to 8 bits, of a group's largest; from level
                 avx512_vnni on they do.
    """

    layout: Layout
    columns: int
    shard_sizes: tuple[int, ...]
    int8_inputs: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return sum(-(-rows // LANES) for rows in self.shard_sizes)

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.layout.groups(self.columns)

    @property
    def block_bytes(self) -> int:
        """Bit planes of one block."""
        return self.columns // COLUMN_UNIT * VECTOR * self.layout.bits

    @property
    def position_bytes(self) -> int:
        """Bytes of a position within its group."""
        return 1 if self.layout.group_size <= 128 else 2

    @property
    def no_position(self) -> int:
        """Stands in salient slots that hold no weight: 0 for who does not look at the top bit."""
        return 1 << (8 * self.position_bytes - 1)

    @property
    def side_bytes(self) -> int:
        """Scales, zeros and salient weights of one group of one block."""
        layout = self.layout
        scale = 1 if layout.scale == "log8" else 2
        slots = layout.salient_count * (self.position_bytes + 2)
        return LANES * (scale + layout.uniform + slots)

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Where side, rows and column scales begin, and where all ends."""
        side = self.blocks * self.block_bytes
        rows = side + _aligned(self.blocks * self.groups * self.side_bytes)
        columns = rows + self.blocks * ROW_VALUES * LANES * 4
        scales = len(self.shard_sizes) * self.columns * 2 if self.layout.column_scale else 0
        return side, rows, columns, columns + _aligned(scales)

    @property
    def nbytes(self) -> int:
        """Size of the packed form."""
        return self.offsets[-1]

    def to_bytes(self) -> bytes:
        """What `torch_binding.cpp` reads: the struct without the address part_rows, and these."""
        layout = self.layout
        side, rows, columns, _ = self.offsets
        struct = X86LayoutStruct(
            columns=self.columns,
            group_size=layout.group_size,
            groups=self.groups,
            part_count=len(self.shard_sizes),
            bits=layout.bits,
            salient_count=layout.salient_count,
            position_bytes=self.position_bytes,
            salient_mask=127 if layout.salient_grid == "sign-magnitude" else 255,
            log_scales=layout.scale == "log8",
            uniform=layout.uniform,
            column_scale=layout.column_scale,
            int8_inputs=self.int8_inputs,
            block_bytes=self.block_bytes,
            side_bytes=self.side_bytes,
            side_offset=side,
            row_offset=rows,
            column_offset=columns,
            packed_bytes=self.nbytes,
            levels=(ctypes.c_int8 * 128)(*_level_table(layout)),
            factors=(ctypes.c_float * LOG_STEPS)(*_FACTORS),
        )
        part_rows = (ctypes.c_int64 * len(self.shard_sizes))(*self.shard_sizes)
        return bytes(struct) + bytes(part_rows)


def _aligned(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def _level_table(layout: Layout) -> list[int]:
    """Level by index: high bits of the code, then u[k], u[k-1], u[k-2]; 128 entries."""
    table = []
    for index in range(2 ** (layout.bits + 2)):
        code, one, two = index >> 2, index >> 1 & 1, index & 1
        level = 2 * (code ^ two) + one if layout.trellis else code
        table.append(layout.codebook_values[level])
    return table * (128 // len(table))
