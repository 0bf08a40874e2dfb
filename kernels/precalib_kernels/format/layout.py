"""The file format, version 1: which tensors replace a weight, their shapes, types and size.

A weight W [N, K] (output rows, input columns; K a multiple of 32) is cut along K into
G = ceil(K / group_size) groups; the last one may be shorter ("ragged"). Every weight has a
`bits`-wide code in the base plane, salient weights included: theirs are the low bits of a
wider code, whose high bits lie in a second plane. The value of a weight is

    base      W[n, k] = s[n, g] * (level[index] - zero[n, g]) / limit * column_scale[k]
    salient   W[n, k] = grid(salient code; row n)                     * column_scale[k]

where limit is 127, or the last level 2**bits - 1 if they are uniform: a scale is about the largest
value of its group and keeps clear of float16's subnormal numbers. The index of a weight's level is
its code; or, with a trellis, it also depends on the low bits u of the two codes before it in its
group (zero before the first one; codes of salient weights count like any others):

    index[k] = 2 * (code[k] xor u[k-2]) + u[k-1]

Then there are twice as many levels as codes, and the quantizer picks the path of least error
through all groups' codes (trellis-coded quantization, Marcellin & Fischer 1990): about 1 dB less
error at no stored bit.

Tensor names below are suffixes of the module that owned the weight. All side tensors are 2-D,
and a row slice, or a column slice at a group boundary, is a slice of each of them, which is
what tensor parallelism needs. The file is the compact form: kernels lay tensors out again when
they are loaded.

| name              | dtype   | shape             | there when                     |
|-------------------|---------|-------------------|--------------------------------|
| qweight           | uint8   | [N, K*bits/8]     | always                         |
| scales            | float16 | [N, G]            | scale == "float16"             |
|                   | uint8   | [N, G]            | scale == "log8"                |
| row_scale         | float16 | [N, 1]            | scale == "log8"                |
| zeros             | uint8   | [N, G]            | uniform levels                 |
| salient           | uint8   | [N, G*S]          | salient_count > 0              |
| salient_scale     | float16 | [N, 1]            | and salient_grid != "row"      |
| salient_offset    | float16 | [N, 1]            | and salient_grid != "row"      |
| column_scale      | float16 | [1, K]            | column_scale                   |

S = salient_bytes: positions and high code bits of a group's salient weights (`salient_index.py`).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError

FORMAT_VERSION = 1
COLUMN_UNIT = 32  # K and group_size are multiples of this, so every group starts on a byte
MAX_SALIENT_COUNT = 32
MAX_GROUP_SIZE = 32768  # positions in a group are 16-bit
MAX_SALIENT_SLOTS = 131072  # group_size * salient_count: the tables of ranks grow with it
LOG_STEPS = 16  # "log8": steps per factor of two; 255 of them span 2**-15.9
JSON_NAMES = {"codebook": "levels"}  # fields that files call by another name
LOG_ZERO = 255  # "log8": the code of a group whose scale is exactly zero

SalientGrid = Literal["row", "sign-magnitude", "min-max"]
ScaleKind = Literal["float16", "log8"]


class TensorSpec(NamedTuple):
    """Shape and type of one stored tensor."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one weight is stored. Two weights with equal layouts can be fused row-wise.

    bits:          width of a base code: 2, 3, 4 or 5.
    group_size:    input columns that share a scale; a multiple of 32.
    codebook:      2**bits int8 entries in code order, twice as many with a trellis; None for the
                   uniform one, 0 … 2**bits - 1, which comes with a zero point per group.
    trellis:       whether an entry's index depends on the codes before it; needs a codebook.
    scale:         "float16": one per group. "log8": row_scale * 2**(-code / 16), one byte per
                   group, code 255 standing for a scale of zero.
    salient_count: the most salient weights a group may have, 0 … 32.
    salient_bits:  width of a salient code: `bits` … 8.
    salient_grid:  "row": row_scale * (code - h) / (h - 1) with h = 2**(salient_bits - 1), "log8"
                   only;
                   "sign-magnitude": ±(salient_offset + salient_scale * magnitude), the top bit
                   of the code being the sign;
                   "min-max": salient_offset + salient_scale * code.
    column_scale:  whether inputs are multiplied by one float16 factor per column.

    Raises FormatError for a combination the format does not have.
    """

    bits: int
    group_size: int
    codebook: tuple[int, ...] | None = None
    trellis: bool = False
    scale: ScaleKind = "float16"
    salient_count: int = 0
    salient_bits: int = 8
    salient_grid: SalientGrid = "sign-magnitude"
    column_scale: bool = False

    def __post_init__(self) -> None:
        def require(holds: bool, what: str) -> None:
            if not holds:
                raise FormatError(f"layout: {what}")

        for field in ("bits", "group_size", "salient_count", "salient_bits"):
            require(type(getattr(self, field)) is int, f"{field} must be a whole number")
        for field in ("trellis", "column_scale"):
            require(type(getattr(self, field)) is bool, f"{field} must be true or false")
        require(self.bits in (2, 3, 4, 5), "bits must be 2, 3, 4 or 5")
        require(
            self.group_size > 0 and self.group_size % COLUMN_UNIT == 0,
            f"group_size must be a positive multiple of {COLUMN_UNIT}",
        )
        require(self.group_size <= MAX_GROUP_SIZE, f"group_size must be at most {MAX_GROUP_SIZE}")
        require(self.scale in ("float16", "log8"), 'scale must be "float16" or "log8"')
        if self.codebook is not None:
            object.__setattr__(self, "codebook", tuple(self.codebook))
            require(
                all(type(level) is int and -128 <= level <= 127 for level in self.codebook)
                and len(self.codebook) == self.codebook_size,
                f"levels must be {self.codebook_size} whole numbers from -128 to 127",
            )
            require(any(self.codebook), "levels must not all be zero")
        require(self.codebook is not None or not self.trellis, "a trellis needs levels")
        require(
            0 <= self.salient_count <= MAX_SALIENT_COUNT,
            f"salient_count must be between 0 and {MAX_SALIENT_COUNT}",
        )
        require(
            self.group_size * self.salient_count <= MAX_SALIENT_SLOTS,
            f"group_size times salient_count must be at most {MAX_SALIENT_SLOTS}",
        )
        require(
            self.bits <= self.salient_bits <= 8, f"salient_bits must be between {self.bits} and 8"
        )
        require(
            self.salient_grid in ("row", "sign-magnitude", "min-max"),
            'salient_grid must be "row", "sign-magnitude" or "min-max"',
        )
        if self.salient_count and self.salient_grid == "row":
            require(self.scale == "log8", 'salient_grid "row" needs scale "log8"')

    @property
    def uniform(self) -> bool:
        """Whether levels are 0 … 2**bits - 1 with a zero point per group."""
        return self.codebook is None

    @property
    def codebook_size(self) -> int:
        """Number of levels: one per code, two with a trellis."""
        return 1 << self.bits + self.trellis

    @property
    def codebook_values(self) -> tuple[int, ...]:
        """The levels in the order of their indices, with the uniform ones spelled out."""
        return tuple(range(self.codebook_size)) if self.codebook is None else self.codebook

    @property
    def codebook_limit(self) -> int:
        """The level that stands for a scale's own value: 127, or the last uniform level."""
        return 2**self.bits - 1 if self.uniform else 127

    @property
    def rank_bits(self) -> int:
        """Bits that name which weights of a group are salient.

        At most m of g positions can be chosen in sum(C(g, j), j = 0 … m) ways; the number of
        the choice is stored. Ten of 128 take 48 bits where a list of 7-bit indices takes 70.
        """
        ways = sum(math.comb(self.group_size, j) for j in range(self.salient_count + 1))
        return (ways - 1).bit_length()

    @property
    def salient_bytes(self) -> int:
        """S: bytes per group for the positions and the high bits of the salient codes."""
        high = self.salient_count * (self.salient_bits - self.bits)
        return (self.rank_bits + high + 7) // 8

    def groups(self, input_size: int) -> int:
        """G: groups in a row of `input_size` weights, a ragged last one included."""
        return -(-input_size // self.group_size)

    def tensors(self, output_size: int, input_size: int) -> dict[str, TensorSpec]:
        """Names, shapes and types of everything stored for a weight [output_size, input_size].

        Raises FormatError when input_size is not a multiple of 32.
        """
        if input_size % COLUMN_UNIT or input_size <= 0 or output_size <= 0:
            raise FormatError(
                f"a weight of shape [{output_size}, {input_size}] cannot be packed: "
                f"its input size must be a multiple of {COLUMN_UNIT}"
            )
        rows, groups = output_size, self.groups(input_size)
        specs = {"qweight": TensorSpec((rows, input_size * self.bits // 8), torch.uint8)}
        log8 = self.scale == "log8"
        specs["scales"] = TensorSpec((rows, groups), torch.uint8 if log8 else torch.float16)
        if log8:
            specs["row_scale"] = TensorSpec((rows, 1), torch.float16)
        if self.uniform:
            specs["zeros"] = TensorSpec((rows, groups), torch.uint8)
        if self.salient_count:
            width = groups * self.salient_bytes
            specs["salient"] = TensorSpec((rows, width), torch.uint8)
            if self.salient_grid != "row":
                specs["salient_scale"] = TensorSpec((rows, 1), torch.float16)
                specs["salient_offset"] = TensorSpec((rows, 1), torch.float16)
        if self.column_scale:
            specs["column_scale"] = TensorSpec((1, input_size), torch.float16)
        return specs

    def stored_bytes(self, output_size: int, input_size: int) -> int:
        """Bytes of all tensors that replace a weight [output_size, input_size]."""
        return sum(spec.nbytes for spec in self.tensors(output_size, input_size).values())

    def bits_per_weight(self, output_size: int, input_size: int) -> float:
        """True size: stored bits of everything that replaces the weight, per weight."""
        return 8 * self.stored_bytes(output_size, input_size) / (output_size * input_size)

    def check(self, tensors: Mapping[str, Tensor], input_size: int, where: str) -> None:
        """Compare names, shapes and types of `tensors` with the format.

        Raises FormatError that begins with `where` and names the tensor.
        """
        if "qweight" not in tensors:
            raise FormatError(f"{where}: tensor 'qweight' is missing; quantize the model again")
        specs = self.tensors(tensors["qweight"].shape[0], input_size)
        for name in sorted(specs.keys() | tensors.keys()):
            if name not in tensors:
                raise FormatError(f"{where}: tensor '{name}' is missing; quantize the model again")
            if name not in specs:
                raise FormatError(f"{where}: tensor '{name}' does not belong to its layout")
            shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
            if (shape, dtype) != specs[name]:
                raise FormatError(
                    f"{where}: tensor '{name}' is {list(shape)} {dtype}, "
                    f"expected {list(specs[name].shape)} {specs[name].dtype}"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the fields that are at their defaults.

        The codebook is called "levels" there.
        """
        fields = {
            JSON_NAMES.get(field.name, field.name): getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        defaults = {
            JSON_NAMES.get(field.name, field.name): field.default
            for field in dataclasses.fields(self)
        }
        kept = {name: value for name, value in fields.items() if value != defaults[name]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Layout":
        """Inverse of `to_dict`. Raises FormatError for unknown or missing fields."""
        own = [field.name for field in dataclasses.fields(cls)]
        names = {JSON_NAMES.get(name, name): name for name in own}
        if unknown := sorted(set(fields) - set(names)):
            raise FormatError(
                f"layout field {unknown[0]!r} is not known to format version {FORMAT_VERSION}; "
                "a newer precalib may have written this checkpoint"
            )
        try:
            return cls(**{names[name]: value for name, value in fields.items()})
        except TypeError as error:
            raise FormatError(f"layout {str(dict(fields))[:1000]}: {error}") from error

    def to_text(self) -> str:
        """One-line form, the way operators carry a layout."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_text(cls, text: str) -> "Layout":
        """Inverse of `to_text`."""
        return cls.from_dict(json.loads(text))


def eq13_bits(bits: int, group_size: int, alpha: float) -> float:
    """Average bits b + 32/g + α·log₂ g of statistical pre-calibration (2501.09107, Eq. 13)."""
    return bits + 32 / group_size + alpha * math.log2(group_size)
