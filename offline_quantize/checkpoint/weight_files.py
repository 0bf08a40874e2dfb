"""Which files hold a checkpoint's weights, and what is in them.

As transformers does: `model.safetensors` where it is there, else the files of the index, else all
there are. Files that contradict each other are refused, unless all loaders would read the same.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import read_json
from offline_quantize.checkpoint.file_patterns import PICKLED_WEIGHTS
from offline_quantize.checkpoint.safetensors_file import MAX_NAME, Entry, read_header, read_pieces
from precalib_kernels.errors import SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_NAME = 255
DOWNLOAD_REMEDY = "download the checkpoint again"
_NOT_SAFETENSORS = (
    "weights in a pickle format can run code when they are read and are refused; convert the "
    "checkpoint to safetensors (save_pretrained does)"
)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint, by their headers.

    shards:   entries of every weight file, by file name, each tensor once.
    metadata: metadata of every weight file.
    index:    the parsed index file, None where none is used.
    notes:    what was decided, a sentence each.
    """

    shards: Mapping[str, Mapping[str, Entry]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    notes: tuple[str, ...]


def read_weight_files(directory: Path) -> WeightFiles:
    """Read the headers of all weight files.

    Raises SourceError for missing, damaged or contradictory files.
    """
    index, notes = _index_in_use(directory)
    owner: Mapping[str, str] = index["weight_map"] if index else {}
    shards: dict[str, dict[str, Entry]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for name in sorted(set(owner.values())) if index else _without_index(directory):
        shards[name], metadata[name] = read_header(directory / name)
    for tensor, name in owner.items():
        if tensor not in shards[name]:
            raise SourceError(
                f"{directory / name}: tensor '{tensor[:MAX_NAME]}' is named by {INDEX} but not in "
                f"the file; {DOWNLOAD_REMEDY}"
            )
    notes += _keep_one_of_each(directory, shards, owner)
    return WeightFiles(shards, metadata, index, tuple(notes))


def _index_in_use(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index; None where there is none, or where it does not belong to a whole single file."""
    if not (directory / INDEX).exists():
        return None, []
    if not (directory / SINGLE).exists():
        return _read_index(directory / INDEX), []
    try:
        index = _read_index(directory / INDEX)
    except SourceError:
        index = {"weight_map": {}}
    if SINGLE in index["weight_map"].values():
        return index, []
    note = f"{SINGLE} is taken and {INDEX}, which names other files, left out, as transformers does"
    return None, [note]


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path, SourceError, DOWNLOAD_REMEDY)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no weight_map; {DOWNLOAD_REMEDY}")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or name in ("", "..") or len(name) > MAX_FILE_NAME:
            raise SourceError(
                f"{path}: tensor '{tensor[:MAX_NAME]}' is said to be in {repr(name)[:60]}, which "
                f"is not a file of this folder; {DOWNLOAD_REMEDY}"
            )
        if not name.endswith(".safetensors"):
            raise SourceError(f"{path.parent / name}: {_NOT_SAFETENSORS}")
    return index


def _without_index(directory: Path) -> list[str]:
    """Names of the weight files where there is no index: the usual one, else all there are."""
    if (directory / SINGLE).exists():
        return [SINGLE]
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if found:
        return found
    for pattern in PICKLED_WEIGHTS:
        if pickled := sorted(directory.glob(pattern)):
            raise SourceError(f"{pickled[0]}: {_NOT_SAFETENSORS}")
    raise SourceError(
        f"{directory}: holds no *.safetensors weights; download or convert the checkpoint to them"
    )


def _keep_one_of_each(
    directory: Path, shards: Mapping[str, dict[str, Entry]], owner: Mapping[str, str]
) -> Iterator[str]:
    """Leave every tensor in one file, that of `owner` or else the first, if the others are equal.

    returns: a note for each file that held one of another file, too.
    """
    first: dict[str, str] = {}
    for name, entries in shards.items():
        for tensor in entries:
            first.setdefault(tensor, name)
    for name, entries in shards.items():
        again = [tensor for tensor in entries if owner.get(tensor, first[tensor]) != name]
        for tensor in again:
            kept = owner.get(tensor, first[tensor])
            there, here = shards[kept][tensor], entries.pop(tensor)
            if not _are_equal(directory / kept, there, directory / name, here):
                named = f", which {INDEX} names," if tensor in owner else ""
                raise SourceError(
                    f"{directory}: tensor '{tensor}' is in {kept}{named} and with other values in "
                    f"{name}, so that it depends on the loader which are taken; {DOWNLOAD_REMEDY}"
                )
        if again:
            more = f" and {len(again) - 1:,} more tensors" if len(again) > 1 else ""
            yield f"'{again[0]}'{more} of {name} also in another file with equal values, taken once"


def _are_equal(path: Path, entry: Entry, other_path: Path, other: Entry) -> bool:
    """Whether two entries hold the same tensor, byte by byte."""
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return False
    pieces = read_pieces(path, entry.begin, entry.end)
    other_pieces = read_pieces(other_path, other.begin, other.end)
    return all(left == right for left, right in zip(pieces, other_pieces, strict=True))
