"""Random damage to the files of a checkpoint, as hypothesis draws it."""

import copy
import json
from typing import Any

from hostile import FIFO, FOLDER, INDEX, SHARDS, Files, Link, split_header, with_header
from hypothesis import strategies as st

HUGE = (2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400)


def nested(depth: int, leaf: Any = 1) -> Any:
    """Lists inside lists."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


VALUES = (
    *(None, True, False, 0, 1, 2, 3, 5, 31, 32, 33, 64, 128, 255, 4096, -1, -32, *HUGE, -(2**63)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "model", "..", ".", "/", "a/b"),
    *("../../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "\x1b[31mred\n", "\u202e", "n" * 5000),
    *([], {}, [0], [[]], {"": {}}, {"a": [None]}, [1, 2, 3], nested(150), nested(40)),
    *("rtn-4", "balanced-4", "log8", "float16", "row", "min-max", "sign-magnitude", *SHARDS),
    *("F16", "U8", "BF16", "F32", "I64", "F8_E4M3", "BOOL", "F4", "U64", "precalib"),
)
DTYPES = ("F16", "U8", "BF16", "F32", "F64", "I8", "I64", "F8_E4M3", "BOOL", "F4", "C64", "X", "")
JSON_FILES = ("config.json", INDEX, "precalib.json", "modules.json")
DEEP = b"[" * 100_000


def damage(data: st.DataObject, files: Files) -> Files:
    """The files with one to three kinds of damage."""
    files = dict(files)
    for _ in range(data.draw(st.sampled_from((1, 1, 1, 2, 3)))):
        kinds = (edit_json, edit_json, edit_json, edit_header, edit_header, edit_tensor, edit_file)
        data.draw(st.sampled_from(kinds))(data, files)
    return files


def edit_json(data: st.DataObject, files: Files) -> None:
    """One value of a JSON file replaced, removed, doubled or renamed; or its text spoilt."""
    name = data.draw(st.sampled_from([n for n in JSON_FILES if n in files]))
    if not isinstance(files[name], bytes):
        return
    if data.draw(st.integers(0, 4)) == 0:
        files[name] = spoilt(data, files[name])
        return
    try:
        tree = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    edit_tree(data, tree)
    text = json.dumps(tree)
    if data.draw(st.integers(0, 9)) == 0 and isinstance(tree, dict) and tree:
        key = data.draw(st.sampled_from(sorted(tree)))
        value = json.dumps(data.draw(st.sampled_from(VALUES)))
        text = text[:-1] + f", {json.dumps(key)}: {value}}}"  # the same key once more
    files[name] = text.encode()


def edit_tree(data: st.DataObject, tree: Any) -> None:
    """Change one value, somewhere in lists and objects."""
    while isinstance(tree, dict | list) and tree:
        keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(tree[key], dict | list) and tree[key] and data.draw(st.integers(0, 4)):
            tree = tree[key]
            continue
        change = data.draw(st.sampled_from(("replace", "replace", "remove", "rename", "number")))
        if change == "remove":
            del tree[key]
        elif change == "rename" and isinstance(tree, dict):
            tree[str(data.draw(st.sampled_from(VALUES)))] = tree.pop(key)
        elif change == "number" and isinstance(tree[key], int | float):
            tree[key] = data.draw(st.integers(-3, 300) | st.floats())
        else:
            tree[key] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
        return


def spoilt(data: st.DataObject, raw: bytes) -> bytes:
    """Bytes that are changed, cut, or replaced by what parsers dislike."""
    where = data.draw(st.integers(0, max(len(raw) - 1, 0)))
    choices = (
        raw[:where] + bytes([data.draw(st.integers(0, 255))]) + raw[where + 1 :],
        raw[:where],
        raw[:where] + b"\xff\xfe" + raw[where:],
        DEEP,
        b"",
        b"\xef\xbb\xbf" + raw,
        b"null",
        b"[]",
        raw + raw,
    )
    return data.draw(st.sampled_from(choices))


def edit_header(data: st.DataObject, files: Files) -> None:
    """Types, shapes, offsets and names of a weight file, or its length, that do not fit."""
    name = data.draw(
        st.sampled_from([n for n in SHARDS if isinstance(files.get(n), bytes)] or [""])
    )
    if not name:
        return
    try:
        header, tensors = split_header(files[name])
        entries = [key for key in header if key != "__metadata__"]
        key = data.draw(st.sampled_from(entries))
        entry = header[key]
        change = data.draw(st.sampled_from(HEADER_CHANGES))
        text: Any = header
        length = None
        if change == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(DTYPES))
        elif change == "shape":
            change_shape(data, entry["shape"])
        elif change == "both":  # still consistent: halves of numbers of twice the size
            swaps = {"F16": "U8", "U8": "F16", "BF16": "F32", "F32": "BF16"}
            factor = {"F16": 2, "U8": 0.5, "BF16": 0.5, "F32": 2}[entry["dtype"]]
            entry["dtype"] = swaps[entry["dtype"]]
            entry["shape"][-1] = int(entry["shape"][-1] * factor)
        elif change == "reshape":
            entry["shape"] = [entry["shape"][0] * entry["shape"][-1], *entry["shape"][1:-1]]
        elif change == "transpose":
            entry["shape"].reverse()
        elif change == "offsets":
            place = data.draw(st.integers(0, 1))
            number = st.sampled_from((0, 1, -1, *HUGE, len(tensors))) | st.integers(0, 5000)
            entry["data_offsets"][place] = data.draw(number)
        elif change == "overlap":
            entry["data_offsets"] = header[data.draw(st.sampled_from(entries))]["data_offsets"]
        elif change == "rename":
            names = ("", "a\0b", "\x1b[2J", "x" * 600, "vision" * 80, f"{key}x", "lm_head.weight")
            header[data.draw(st.sampled_from(names))] = header.pop(key)
        elif change == "swap":
            other = data.draw(st.sampled_from(entries))
            header[key], header[other] = header[other], header[key]
        elif change == "drop":
            del header[key]
        elif change == "tree":
            edit_tree(data, header)
        elif change == "twice":
            text = json.dumps(header)[:-1].encode()
            text += b", " + json.dumps({key: entry})[1:].encode()
        elif change == "raw":
            text = spoilt(data, json.dumps(header).encode())
        else:
            length = data.draw(st.sampled_from((0, 1, 8, 2**20, *HUGE)) | st.integers(0, 3000))
        files[name] = with_header(text, tensors, length)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return  # earlier damage left nothing to edit


HEADER_CHANGES = (
    *("dtype", "shape", "shape", "both", "reshape", "transpose", "offsets", "overlap", "rename"),
    *("swap", "drop", "tree", "tree", "twice", "raw", "length"),
)


def change_shape(data: st.DataObject, shape: list[Any]) -> None:
    """Another dimension, one more or one less."""
    number = st.sampled_from((0, 1, -1, 2, 32, 64, *HUGE, 0.5, None, "8"))
    change = data.draw(st.sampled_from(("set", "set", "append", "pop")))
    if change == "append":
        shape.append(data.draw(number))
    elif change == "pop":
        shape.pop()
    else:
        shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(number)


PATTERNS = (
    *(b"\xff", b"\x00", b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\xff\x7b", b"\x01\x00"),
    *(b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\x7f\x7f", b"\xaa", b"\x55\xaa\x01"),
)


def edit_tensor(data: st.DataObject, files: Files) -> None:
    """Bytes of one tensor: not-a-number, infinite, all ones, the largest, or random."""
    name = data.draw(
        st.sampled_from([n for n in SHARDS if isinstance(files.get(n), bytes)] or [""])
    )
    try:
        header, tensors = split_header(files[name])
        key = data.draw(st.sampled_from([k for k in header if k != "__metadata__"]))
        begin, end = header[key]["data_offsets"]
        pattern = data.draw(st.sampled_from(PATTERNS) | st.binary(min_size=1, max_size=16))
        first = begin + data.draw(st.sampled_from((0, 0, (end - begin) // 2, end - begin - 2)))
        last = data.draw(st.sampled_from((end, min(first + len(pattern), end))))
        if not 0 <= first < last <= len(tensors):
            return
        filled = (pattern * ((last - first) // len(pattern) + 1))[: last - first]
        files[name] = with_header(header, tensors[:first] + filled + tensors[last:])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return


def edit_file(data: st.DataObject, files: Files) -> None:
    """A file cut, lengthened, removed, renamed, or something else in its place."""
    name = data.draw(st.sampled_from(sorted(files)))
    there = files[name]
    change = data.draw(st.sampled_from(("cut", "longer", "remove", "rename", "other", "copy")))
    if change == "cut" and isinstance(there, bytes):
        files[name] = there[: data.draw(st.integers(0, len(there)))]
    elif change == "longer" and isinstance(there, bytes):
        files[name] = there + data.draw(st.binary(min_size=1, max_size=64))
    elif change == "remove":
        del files[name]
    elif change == "rename":
        files[f"{name}{data.draw(st.sampled_from(('.partial', '.bin', 'x', '.safetensors')))}"] = (
            files.pop(name)
        )
    elif change == "copy":
        names = ("extra.safetensors", "model.safetensors", "adapter_config.json", "a/b.json")
        files[data.draw(st.sampled_from((*names, "precalib.job.json", "e\udcff\n.json")))] = there
    else:
        links = (name, "/etc/passwd", "/dev/zero", "/", "no/such/file", "config.json", SHARDS[0])
        files[name] = data.draw(st.sampled_from((FIFO, FOLDER, *map(Link, links))))
