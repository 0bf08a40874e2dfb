"""Safetensors files read and written one tensor at a time.

The safetensors library writes a file from tensors that are all in memory. Here a file is laid out
from shapes first and filled tensor by tensor, in any order, so that memory is bounded by the
largest tensor and not by the shard. Reading goes through plain file reads rather than a memory
map, whose touched pages would count as resident memory.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offline_quantize import memory
from offline_quantize.checkpoint.atomic_files import loads_json
from precalib_kernels.errors import SourceError

COPY_BYTES = 16 << 20
MAX_NAME = 512  # characters; patterns are searched in names, which takes the square of it
MAX_DIMENSION = 1 << 40

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its safetensors type name, shape and bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return self.end - self.begin

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def arrange(self, elements: Tensor) -> Tensor:
        """The tensor, of its elements in the order of the file."""
        return elements.view(self.shape)


@dataclasses.dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is: the file's path, the tensor's name and its entry in the file."""

    path: Path
    name: str
    entry: Entry

    def read(self) -> Tensor:
        """The tensor, as stored. Raises SourceError as `read_tensor` does."""
        return read_tensor(self.path, self.name, self.entry)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries of a safetensors file in the order of their bytes, and its metadata.

    The safetensors library checks the file first (offsets, sizes, duplicate names).
    Raises SourceError that names the file when it is missing, truncated or damaged.
    """
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing; download the checkpoint again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, RuntimeError) as error:  # the last of torch, for its size
        if memory.is_short(error):
            raise SourceError(f"{path}: {memory.SHORT}") from error
        raise SourceError(
            f"{path}: not a whole safetensors file ({str(error)[:300]}); download it again"
        ) from error
    with _reading(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = _parse_header(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    _check_names(path, header)
    start = 8 + length
    entries = {
        name: Entry(
            fields["dtype"],
            tuple(fields["shape"]),
            start + fields["data_offsets"][0],
            start + fields["data_offsets"][1],
        )
        for name, fields in header.items()
    }
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[0]))), metadata


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    """The header's JSON, which the library has parsed before. Raises SourceError."""
    try:
        header: dict[str, Any] = loads_json(data)
    except (ValueError, RecursionError) as error:  # a name twice, or changed meanwhile
        raise SourceError(f"{path}: its header is damaged ({error}); download it again") from error
    return header


def _check_names(path: Path, header: Mapping[str, Any]) -> None:
    """Raise SourceError for names that no model has, and dimensions past all memory."""
    for name, fields in header.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise SourceError(
                f"{path}: {name[:60]!a} is no name of a tensor (at most {MAX_NAME} printable "
                "characters); download it again"
            )
        if any(size > MAX_DIMENSION for size in fields["shape"]):
            raise SourceError(
                f"{path}: tensor '{name}' has the impossible shape {fields['shape']}; "
                "download it again"
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[io.FileIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); try again") from error


def read_tensor(path: Path, name: str, entry: Entry) -> Tensor:
    """One tensor of a file, as stored. Raises SourceError for a type torch cannot hold here."""
    if entry.dtype not in TORCH_DTYPES:
        raise SourceError(f"{path}: tensor '{name}' has type {entry.dtype}, which is not read here")
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.end - entry.begin > _memory():
        raise SourceError(
            f"{path}: tensor '{name}' has {entry.nbytes / 1e9:.1f} GB, more than this machine's "
            "memory; use a machine with more"
        )
    try:
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        data = bytearray(entry.end - entry.begin)
    except (MemoryError, RuntimeError) as error:
        raise SourceError(
            f"{path}: tensor '{name}' of shape {list(entry.shape)}: {memory.SHORT}"
        ) from error
    with _reading(path) as file:
        file.seek(entry.begin)
        view, done = memoryview(data), 0
        while done < len(data):
            count = file.readinto(view[done:])
            if not count:
                raise SourceError(f"{path}: tensor '{name}' is truncated; download it again")
            done += count
    return entry.arrange(torch.frombuffer(data, dtype=dtype))


@functools.cache
def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_pieces(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Bytes [begin, end) of a file in pieces of at most 16 MiB; without `end`, all the rest."""
    with _reading(path) as file:
        end = file.seek(0, os.SEEK_END) if end is None else end
        file.seek(begin)
        while begin < end:
            piece = file.read(min(COPY_BYTES, end - begin))
            if not piece:
                raise SourceError(f"{path}: truncated while reading; download it again")
            begin += len(piece)
            yield piece


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as bytes in memory order, little-endian."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """Header of a file to be written and where each tensor will lie."""

    header: bytes
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return max((entry.end for entry in self.entries.values()), default=len(self.header))


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> FileLayout:
    """Lay out a safetensors file.

    tensors: type name, shape and bytes of each tensor, in the order they are to lie. Tensors
             with wider elements are moved first, so that each lies at a multiple of its element
             size, as the library writes them.
    """
    widths = {name: _width(shape, size) for name, (_, shape, size) in tensors.items()}
    order = sorted(tensors, key=lambda name: -widths[name])
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape, size = tensors[name]
        end = offset + size
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {}
    for name in order:
        begin, end = fields[name]["data_offsets"]
        entries[name] = Entry(tensors[name][0], tensors[name][1], start + begin, start + end)
    return FileLayout(len(text).to_bytes(8, "little") + text, entries)


def _width(shape: tuple[int, ...], size: int) -> int:
    return size // max(math.prod(shape), 1)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; threads may write to different places at once."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
