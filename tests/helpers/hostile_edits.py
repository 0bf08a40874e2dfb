"""Edits of the files of a checkpoint in memory, for `hostile_corpus.py`."""

import json
from collections.abc import Callable
from typing import Any

from hostile import SHARDS, Files, Sparse, split_header, with_header

FIRST, SECOND = SHARDS
Edit = Callable[[Any], Any]
Change = Callable[[Files], None]  # in place


def header(
    edit: Callable[[dict[str, Any]], Any], file: str = FIRST, length: int | None = None
) -> Change:
    """Edits the header of a weight file; what `edit` returns, if anything, takes its place."""

    def change(files: Files) -> None:
        fields, tensors = split_header(files[file])
        changed = edit(fields)
        files[file] = with_header(fields if changed is None else changed, tensors, length)

    return change


def entry(name: str, file: str = FIRST, **fields: Any) -> Change:
    """Sets fields of one tensor in the header."""
    return header(lambda h: h[name].update(fields), file)


def raw(file: str, edit: Callable[[bytes], bytes]) -> Change:
    def change(files: Files) -> None:
        files[file] = edit(files[file])

    return change


def put(name: str, data: Any) -> Change:
    """Puts a file, or what stands in its place."""

    def change(files: Files) -> None:
        files[name] = data

    return change


def json_of(file: str, edit: Callable[[Any], Any]) -> Change:
    def change(files: Files) -> None:
        tree = json.loads(files[file])
        edit(tree)
        files[file] = json.dumps(tree).encode()

    return change


def layout(**fields: Any) -> Change:
    """Sets fields of the layout of the first layer."""
    label = "balanced-4"
    return json_of(
        "config.json", lambda c: c["quantization_config"]["layouts"][label].update(fields)
    )


def quantization(edit: Callable[[Any], Any]) -> Change:
    return json_of("config.json", lambda config: edit(config["quantization_config"]))


def fill(name: str, pattern: bytes, file: str = FIRST, size: int | None = None) -> Change:
    """Overwrites a tensor, or its first `size` bytes, with a pattern."""

    def change(files: Files) -> None:
        fields, tensors = split_header(files[file])
        begin, end = fields[name]["data_offsets"]
        end = end if size is None else begin + size
        data = (pattern * (end - begin))[: end - begin]
        files[file] = with_header(fields, tensors[:begin] + data + tensors[end:])

    return change


def sparse(name: str) -> Change:
    """A tensor of 2 TB in a file that takes no disk."""
    fields = {name: {"dtype": "U8", "shape": [8, 1 << 38], "data_offsets": [0, 1 << 41]}}
    return put(FIRST, Sparse(with_header(fields, b""), 1 << 41))


def twice(name: str) -> Edit:
    def edit(fields: dict[str, Any]) -> bytes:
        other = {**fields[name], "dtype": "I8"}
        return json.dumps(fields)[:-1].encode() + b", " + json.dumps({name: other})[1:].encode()

    return edit


def manifest(edit: Edit) -> Change:
    return json_of("precalib.json", edit)
