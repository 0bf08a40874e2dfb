"""The memory layout of a packed weight, as `memory_layout.h` has it: one tensor of bytes.

Rows go in blocks of 16, one per 32-bit lane of a vector; each fused shard begins a block.
There are, one after another and for every block,

| section | bytes                          | content                                             |
|---------|--------------------------------|-----------------------------------------------------|
| planes  | 64 * bits per 32 columns       | the codes, see `decode.h` and `shuffle_levels.h`    |
| groups  | per group: 16 or 32            | scales, in the file's form                          |
|         | 16 with a uniform grid         | zero points                                         |
|         | 48 or 64 per salient slot      | positions, codes, codebook entries of the base      |
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
    """`X86Layout` of memory_layout.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "group_size", "groups", "shard_count")),
        ("shard_rows", ctypes.POINTER(ctypes.c_int64)),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("bits", "salient_count", "position_bytes", "salient_mask"),
                *("log_scales", "uniform", "column_scale", "int8_inputs"),
                *("block_bytes", "metadata_bytes", "metadata_offset", "row_offset"),
                *("column_offset", "packed_bytes"),
            )
        ),
        ("codebook", ctypes.c_int8 * 128),
        ("factors", ctypes.c_float * LOG_STEPS),
        ("trellis", ctypes.c_int64),
        ("nibbles", ctypes.c_int64),
    )


@dataclasses.dataclass(frozen=True)
class X86Layout:
    """Sizes and offsets of a weight in this layout.

    shard_sizes: rows of the fused shards; each is padded to whole blocks.
    int8_inputs: whether products round activations to 8 bits of a group's largest.
    nibbles:     whether codes of 3 and 4 bits are nibbles, as `library.takes_nibbles` tells.
    """

    layout: Layout
    columns: int
    shard_sizes: tuple[int, ...]
    int8_inputs: bool = False
    nibbles: bool = False

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
        """Codes of one block."""
        return self.columns // COLUMN_UNIT * VECTOR * self.layout.bits

    @property
    def has_nibbles(self) -> bool:
        """Whether the codes of this weight are nibbles, and not bit planes."""
        return self.nibbles and self.layout.bits in (3, 4)

    @property
    def position_bytes(self) -> int:
        """Bytes of a position within its group."""
        return 1 if self.layout.group_size <= 128 else 2

    @property
    def no_position(self) -> int:
        """Stands in salient slots that hold no weight: 0 for who does not look at the top bit."""
        return 1 << (8 * self.position_bytes - 1)

    @property
    def metadata_bytes(self) -> int:
        """Scales, zero points and salient weights of one group of one block."""
        layout = self.layout
        scale = 1 if layout.scale == "log8" else 2
        slots = layout.salient_count * (self.position_bytes + 2)
        return LANES * (scale + layout.uniform + slots)

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Where group metadata, row values and column scales begin, and the end."""
        metadata = self.blocks * self.block_bytes
        rows = metadata + _aligned(self.blocks * self.groups * self.metadata_bytes)
        columns = rows + self.blocks * ROW_VALUES * LANES * 4
        scales = len(self.shard_sizes) * self.columns * 2 if self.layout.column_scale else 0
        return metadata, rows, columns, columns + _aligned(scales)

    @property
    def nbytes(self) -> int:
        """Size of the weight in this layout."""
        return self.offsets[-1]

    def to_bytes(self) -> bytes:
        """What `torch_binding.cpp` reads: the struct, and the rows of each shard."""
        shard_rows = (ctypes.c_int64 * len(self.shard_sizes))(*self.shard_sizes)
        return bytes(self.to_struct()) + bytes(shard_rows)

    def to_struct(self) -> X86LayoutStruct:
        """The same as the kernels have it, without the address `shard_rows`."""
        layout = self.layout
        metadata, rows, columns, _ = self.offsets
        return X86LayoutStruct(
            columns=self.columns,
            group_size=layout.group_size,
            groups=self.groups,
            shard_count=len(self.shard_sizes),
            bits=layout.bits,
            salient_count=layout.salient_count,
            position_bytes=self.position_bytes,
            salient_mask=127 if layout.salient_grid == "sign-magnitude" else 255,
            log_scales=layout.scale == "log8",
            uniform=layout.uniform,
            column_scale=layout.column_scale,
            int8_inputs=self.int8_inputs,
            block_bytes=self.block_bytes,
            metadata_bytes=self.metadata_bytes,
            metadata_offset=metadata,
            row_offset=rows,
            column_offset=columns,
            packed_bytes=self.nbytes,
            codebook=(ctypes.c_int8 * 128)(*_codebook_table(layout)),
            factors=(ctypes.c_float * LOG_STEPS)(*_FACTORS),
            trellis=layout.trellis,
            nibbles=self.has_nibbles,
        )


def _aligned(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def _codebook_table(layout: Layout) -> list[int]:
    """Codebook entry by index: high bits of the code, then u[k], u[k-1], u[k-2]; 128 entries."""
    table = []
    for index in range(2 ** (layout.bits + 2)):
        code, one, two = index >> 2, index >> 1 & 1, index & 1
        entry = 2 * (code ^ two) + one if layout.trellis else code
        table.append(layout.codebook_values[entry])
    return table * (128 // len(table))
