"""Random damage to the files of a checkpoint.

What is drawn comes from a `random.Random`: of a seed, or one that hypothesis makes and shrinks.
"""

import copy
import hashlib
import json
from random import Random
from typing import Any

from hostile import FIFO, FOLDER, INDEX, SHARDS, Files, Link, split_header, with_header

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
FLOATS = (0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"))
DTYPES = ("F16", "U8", "BF16", "F32", "F64", "I8", "I64", "F8_E4M3", "BOOL", "F4", "C64", "X", "")
JSON_FILES = ("config.json", INDEX, "precalib.json", "modules.json")
DEEP = b"[" * 100_000


def damage(random: Random, files: Files) -> Files:
    """The files with one to three kinds of damage."""
    files = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kinds = (edit_json, edit_json, edit_json, edit_header, edit_header, edit_tensor, edit_file)
        random.choice(kinds)(random, files)
    if random.randint(0, 1):
        record(files)
    return files


def record(files: Files) -> None:
    """Write the hashes of the damaged files into the manifest, as whoever means harm would."""
    try:
        manifest = json.loads(files["precalib.json"])
        for name, file in manifest["files"].items():
            if isinstance(files.get(name), bytes):
                digest = hashlib.sha256(files[name]).hexdigest()
                file.update(size=len(files[name]), sha256=digest)
        files["precalib.json"] = json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # a source has none, and earlier damage may have left none


def edit_json(random: Random, files: Files) -> None:
    """One value of a JSON file replaced, removed, doubled or renamed; or its text spoilt."""
    name = random.choice([n for n in JSON_FILES if n in files])
    if not isinstance(files[name], bytes):
        return
    if random.randint(0, 4) == 0:
        files[name] = spoilt(random, files[name])
        return
    try:
        tree = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    edit_tree(random, tree)
    text = json.dumps(tree)
    if random.randint(0, 9) == 0 and isinstance(tree, dict) and tree:
        key = random.choice(sorted(tree))
        value = json.dumps(random.choice(VALUES))
        text = text[:-1] + f", {json.dumps(key)}: {value}}}"  # the same key once more
    files[name] = text.encode()


def edit_tree(random: Random, tree: Any) -> None:
    """Change one value, somewhere in lists and objects."""
    while isinstance(tree, dict | list) and tree:
        keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = random.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and random.randint(0, 4):
            tree = tree[key]
            continue
        change = random.choice(("replace", "replace", "remove", "rename", "number"))
        if change == "remove":
            del tree[key]
        elif change == "rename" and isinstance(tree, dict):
            tree[str(random.choice(VALUES))] = tree.pop(key)
        elif change == "number" and isinstance(tree[key], int | float):
            tree[key] = random.choice((random.randint(-3, 300), random.uniform(-2, 2), *FLOATS))
        else:
            tree[key] = copy.deepcopy(random.choice(VALUES))
        return


def spoilt(random: Random, raw: bytes) -> bytes:
    """Bytes that are changed, cut, or replaced by what parsers dislike."""
    where = random.randint(0, max(len(raw) - 1, 0))
    choices = (
        raw[:where] + bytes([random.randint(0, 255)]) + raw[where + 1 :],
        raw[:where],
        raw[:where] + b"\xff\xfe" + raw[where:],
        DEEP,
        b"",
        b"\xef\xbb\xbf" + raw,
        b"null",
        b"[]",
        raw + raw,
    )
    return random.choice(choices)


def edit_header(random: Random, files: Files) -> None:
    """Types, shapes, offsets and names of a weight file, or its length, that do not fit."""
    name = random.choice([n for n in SHARDS if isinstance(files.get(n), bytes)] or [""])
    if not name:
        return
    try:
        header, tensors = split_header(files[name])
        entries = [key for key in header if key != "__metadata__"]
        key = random.choice(entries)
        entry = header[key]
        change = random.choice(HEADER_CHANGES)
        text: Any = header
        length = None
        if change == "dtype":
            entry["dtype"] = random.choice(DTYPES)
        elif change == "shape":
            change_shape(random, entry["shape"])
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
            place = random.randint(0, 1)
            numbers = (0, 1, -1, *HUGE, len(tensors), *(random.randint(0, 5000) for _ in "12345"))
            entry["data_offsets"][place] = random.choice(numbers)
        elif change == "overlap":
            entry["data_offsets"] = header[random.choice(entries)]["data_offsets"]
        elif change == "rename":
            names = ("", "a\0b", "\x1b[2J", "x" * 600, "vision" * 80, f"{key}x", "lm_head.weight")
            header[random.choice(names)] = header.pop(key)
        elif change == "swap":
            other = random.choice(entries)
            header[key], header[other] = header[other], header[key]
        elif change == "drop":
            del header[key]
        elif change == "tree":
            edit_tree(random, header)
        elif change == "twice":
            text = json.dumps(header)[:-1].encode()
            text += b", " + json.dumps({key: entry})[1:].encode()
        elif change == "raw":
            text = spoilt(random, json.dumps(header).encode())
        else:
            length = random.choice((0, 1, 8, 2**20, *HUGE, random.randint(0, 3000)))
        files[name] = with_header(text, tensors, length)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return  # earlier damage left nothing to edit


HEADER_CHANGES = (
    *("dtype", "shape", "shape", "both", "reshape", "transpose", "offsets", "overlap", "rename"),
    *("swap", "drop", "tree", "tree", "twice", "raw", "length"),
)


def change_shape(random: Random, shape: list[Any]) -> None:
    """Another dimension, one more or one less."""
    number = random.choice((0, 1, -1, 2, 32, 64, *HUGE, 0.5, None, "8"))
    change = random.choice(("set", "set", "append", "pop"))
    if change == "append":
        shape.append(number)
    elif change == "pop":
        shape.pop()
    else:
        shape[random.randint(0, len(shape) - 1)] = number


PATTERNS = (
    *(b"\xff", b"\x00", b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\xff\x7b", b"\x01\x00"),
    *(b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\x7f\x7f", b"\xaa", b"\x55\xaa\x01"),
)


def edit_tensor(random: Random, files: Files) -> None:
    """Bytes of one tensor: not-a-number, infinite, all ones, the largest, or random."""
    name = random.choice([n for n in SHARDS if isinstance(files.get(n), bytes)] or [""])
    try:
        header, tensors = split_header(files[name])
        key = random.choice([k for k in header if k != "__metadata__"])
        begin, end = header[key]["data_offsets"]
        pattern = random.choice((*PATTERNS, random.randbytes(random.randint(1, 16))))
        first = begin + random.choice((0, 0, (end - begin) // 2, end - begin - 2))
        last = random.choice((end, min(first + len(pattern), end)))
        if not 0 <= first < last <= len(tensors):
            return
        filled = (pattern * ((last - first) // len(pattern) + 1))[: last - first]
        files[name] = with_header(header, tensors[:first] + filled + tensors[last:])
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
        return


def edit_file(random: Random, files: Files) -> None:
    """A file cut, lengthened, removed, renamed, or something else in its place."""
    name = random.choice(sorted(files))
    there = files[name]
    change = random.choice(("cut", "longer", "remove", "rename", "other", "copy"))
    if change == "cut" and isinstance(there, bytes):
        files[name] = there[: random.randint(0, len(there))]
    elif change == "longer" and isinstance(there, bytes):
        files[name] = there + random.randbytes(random.randint(1, 64))
    elif change == "remove":
        del files[name]
    elif change == "rename":
        files[f"{name}{random.choice(('.partial', '.bin', 'x', '.safetensors'))}"] = files.pop(name)
    elif change == "copy":
        names = ("extra.safetensors", "model.safetensors", "adapter_config.json", "a/b.json")
        files[random.choice((*names, "precalib.job.json", "e\udcff\n.json"))] = there
    else:
        links = (name, "/etc/passwd", "/dev/zero", "/", "no/such/file", "config.json", SHARDS[0])
        files[name] = random.choice((FIFO, FOLDER, *map(Link, links)))
