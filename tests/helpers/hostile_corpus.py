"""Fixed damage to checkpoints: what each kind of lie looks like, and what is said of it.

`said` is a pattern of the sentence of a refusal, or of the first fault that `verify` tells.
`served` is a pattern of the refusal when vLLM loads it; None where that rightly minds nothing.
"""

import dataclasses

from hostile import FIFO, FOLDER, INDEX, Link, module
from hostile_edits import (
    FIRST,
    SECOND,
    Change,
    entry,
    fill,
    header,
    json_of,
    layout,
    manifest,
    put,
    quantization,
    raw,
    sparse,
    twice,
)

VLLM = "vLLM stops before the plugin is asked"
ENDLESS = "vLLM reads it without end"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of damage: `change` edits the files in place."""

    change: Change
    said: str
    served: str | None = None


Q0, Q1 = f"{module(0)}.qweight", f"{module(1)}.qweight"
NAN, INFINITE, ONES = b"\x01\x7e", b"\x00\x7c", b"\xff"
DAMAGED = "not a whole safetensors file"
OUTSIDE = "names a weight outside its group"
HASH = "its (sha256|size) is not the recorded one"


def headers(first: str, second: str) -> dict[str, Case]:
    """Lies in the header of the first weight file; first, second: tensors that are in it."""
    return {
        "empty file": Case(raw(FIRST, lambda _: b""), DAMAGED, VLLM),
        "seven bytes": Case(raw(FIRST, lambda data: data[:7]), DAMAGED, VLLM),
        "header cut": Case(raw(FIRST, lambda data: data[:200]), DAMAGED, VLLM),
        "tensors cut": Case(raw(FIRST, lambda data: data[:-1]), DAMAGED, VLLM),
        "bytes after the last tensor": Case(raw(FIRST, lambda data: data + b"x"), DAMAGED, VLLM),
        "header longer than the file": Case(header(dict.copy, length=1 << 40), DAMAGED, VLLM),
        "header of 2**64 - 1 bytes": Case(header(dict.copy, length=-1), DAMAGED, VLLM),
        "header of no bytes": Case(header(dict.copy, length=0), DAMAGED, VLLM),
        "header is a list": Case(header(lambda _: b"[]"), DAMAGED, VLLM),
        "header is not UTF-8": Case(header(lambda _: b'{"\xff": 1}'), DAMAGED, VLLM),
        "header nested 100,000 deep": Case(header(lambda _: b"[" * 100_000), DAMAGED, VLLM),
        "a name twice": Case(header(twice(first)), "stands twice with diff", "torch.int8"),
        "unknown type": Case(entry(first, dtype="Q4"), DAMAGED, VLLM),
        "a wider type": Case(entry(first, dtype="I64"), DAMAGED, VLLM),
        "another type of the same size": Case(
            entry(first, dtype="I8"), "expected .* torch.uint8|" + HASH, "uint8"
        ),
        "one row more": Case(entry(first, shape=[9, 64]), DAMAGED, VLLM),
        "rows and columns exchanged": Case(
            entry(first, shape=[64, 8]), HASH, "in the checkpoint, expected"
        ),
        "one dimension": Case(entry(first, shape=[512]), HASH, "expected"),
        "no dimension": Case(entry(first, shape=[]), DAMAGED, VLLM),
        "negative dimension": Case(entry(first, shape=[-8, 64]), DAMAGED, VLLM),
        "dimensions past 64 bits": Case(entry(first, shape=[1 << 63, 1 << 63]), DAMAGED, VLLM),
        "a huge dimension beside zero": Case(
            entry(first, shape=[0, (1 << 62)], data_offsets=[0, 0]),
            DAMAGED,
            VLLM,
        ),
        "offsets exchanged": Case(entry(first, data_offsets=[512, 0]), DAMAGED, VLLM),
        "offsets past the file": Case(entry(first, data_offsets=[0, 1 << 60]), DAMAGED, VLLM),
        "negative offsets": Case(entry(first, data_offsets=[-1, 511]), DAMAGED, VLLM),
        "overlapping tensors": Case(
            header(lambda h: h[second].update(data_offsets=h[first]["data_offsets"])), DAMAGED, VLLM
        ),
        "a hole between tensors": Case(header(lambda h: h.pop(second)), DAMAGED, VLLM),
        "a name that moves the cursor": Case(
            header(lambda h: h.update({"\x1b[2J": h.pop(first)})),
            "no name of a tensor",
            "was not in",
        ),
        "a name of 5,000 letters": Case(
            header(lambda h: h.update({"v" * 5000: h.pop(first)})),
            "no name of a tensor",
            "was not in",
        ),
        "a tensor of 2 TB": Case(sparse(first), "memory", VLLM),
    }


def ranks(name: str, layer: int) -> Case:
    file = FIRST if layer < 2 else SECOND
    return Case(
        fill(f"{module(layer)}.{name}", ONES, file), HASH, "names a weight outside its group"
    )


CONTENTS = {
    "salient ranks past their number, grid of rows": ranks("salient", 0),
    "salient ranks past their number, min-max": ranks("salient", 1),
    "salient ranks past their number, 2 bits": ranks("salient", 3),
    **{
        f"{name} of layer {layer} is {what}": Case(
            fill(f"{module(layer)}.{name}", pattern, FIRST if layer < 2 else SECOND, 2),
            HASH,
            "is not finite everywhere",
        )
        for layer, name in (
            *((0, "row_scale"), (0, "column_scale"), (1, "scales"), (1, "salient_scale")),
            *((1, "salient_offset"), (2, "scales"), (3, "row_scale")),
        )
        for what, pattern in (("not a number", NAN), ("infinite", INFINITE))
    },
    "a flipped bit": Case(fill(Q0, b"\x5a", size=1), HASH),
    "zero points past the codes": Case(fill(f"{module(2)}.zeros", ONES, SECOND), HASH),
}

CONFIGURATION = {
    "bits 9": Case(layout(bits=9), "bits must be 2, 3, 4 or 5", "bits must be"),
    "bits 0": Case(layout(bits=0), "bits must be", "bits must be"),
    "bits as text": Case(layout(bits="4"), "bits must be a whole number", "bits must be a whole"),
    "bits true": Case(layout(bits=True), "bits must be a whole number", "bits must be a whole"),
    "group of 0": Case(layout(group_size=0), "group_size must be", "group_size must be"),
    "group of 33": Case(layout(group_size=33), "group_size must be", "group_size must be"),
    "group of 2**60": Case(layout(group_size=1 << 60), "at most 32768", "at most 32768"),
    "tables of ranks past memory": Case(
        layout(group_size=32768, salient_count=32),
        "times salient_count must",
        "times salient_count",
    ),
    "33 salient weights": Case(layout(salient_count=33), "salient_count", "salient_count"),
    "salient weights below none": Case(layout(salient_count=-1), "salient_count", "salient_count"),
    "salient bits below the base": Case(layout(salient_bits=3), "salient_bits", "salient_bits"),
    "salient bits 9": Case(layout(salient_bits=9), "salient_bits must be", "salient_bits must be"),
    "another number of salient weights": Case(layout(salient_count=3), HASH, "expected"),
    "unknown scale": Case(layout(scale=["log8"]), "scale must be", "scale must be"),
    "no levels for a trellis": Case(layout(levels=None), "a trellis needs levels", "trellis needs"),
    "one level missing": Case(layout(levels=[1] * 31), "levels must be 32", "levels must be 32"),
    "levels past int8": Case(layout(levels=[999] * 32), "levels must be", "levels must be"),
    "levels of zeros": Case(layout(levels=[0] * 32), "must not all be zero", "not all be zero"),
    "levels that are a number": Case(layout(levels=7), "layout", "layout"),
    "an unknown field": Case(layout(shift=1), "is not known to format version 1", "not known to"),
    "an unknown field with an endless name": Case(
        layout(**{"n" * 100_000: 1}), "field 'n{499}….*is not known to format", "is not known to"
    ),
    "another version": Case(
        quantization(lambda q: q.update(format_version=99)), "has format_version 99", "version 99"
    ),
    "no layouts": Case(quantization(lambda q: q.pop("layouts")), "lacks", "lacks"),
    "layouts that are a list": Case(quantization(lambda q: q.update(layouts=[])), "lacks", "lacks"),
    "modules without layouts": Case(
        quantization(lambda q: q["layouts"].clear()), "undefined layout", "undefined layout"
    ),
    "no modules": Case(quantization(lambda q: q["modules"].clear()), "names no packed module"),
    "a module that is nowhere": Case(
        quantization(lambda q: q["modules"].update({"ghost": "rtn-4"})), "config.json: " + HASH
    ),
    "a module with a name that moves the cursor": Case(
        quantization(lambda q: q["modules"].update({"\x1b[2J": "rtn-4"})),
        "not a name",
        "not a name",
    ),
    "layers exchanged": Case(
        quantization(lambda q: q["modules"].update({module(0): "rtn-4"})),
        HASH,
        "expected",
    ),
    "configuration nested 100,000 deep": Case(
        put("config.json", b'{"a":' * 100_000), "not valid JSON", VLLM
    ),
    "configuration nested 500 deep": Case(
        put("config.json", b'{"a":' * 500 + b"1" + b"}" * 500), "nested more than 100 deep", VLLM
    ),
    "a key twice": Case(
        raw("config.json", lambda data: data.rstrip()[:-1] + b', "model_type": "x"}'),
        "key 'model_type' stands twice with different values",
    ),
    "configuration is not UTF-8": Case(
        raw("config.json", lambda data: data.replace(b"llama", b"\xff\xff")), "not valid JSON", VLLM
    ),
    "configuration is a folder": Case(put("config.json", FOLDER), "not a file", VLLM),
    "configuration never ends": Case(put("config.json", Link("/dev/zero")), "not a file", ENDLESS),
    "configuration is a pipe": Case(put("config.json", FIFO), "not a file", ENDLESS),
    "configuration links to itself": Case(put("config.json", Link("config.json")), "", VLLM),
}


MANIFEST = {
    "files outside": Case(
        manifest(lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}})),
        "lies outside of it",
    ),
    "absolute files": Case(
        manifest(lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}})),
        "lies outside of it",
    ),
    "a size of 400 digits": Case(
        manifest(lambda m: m["files"][FIRST].update(size=10**400)), "is missing or damaged"
    ),
    "negative sizes": Case(
        manifest(lambda m: m["totals"].update(weights=-1)), "missing or damaged"
    ),
    "activations that say nothing": Case(
        manifest(lambda m: m["job"].update(activations={"text": "x"})), "is missing or damaged"
    ),
    "no manifest": Case(lambda files: files.pop("precalib.json"), "precalib.json: the file is mis"),
    "a manifest of other weights": Case(
        manifest(lambda m: m["tensors"].pop(module(0))), "is not both in config.json and in"
    ),
}


def owner(tensor: str, name: object) -> Case:
    return Case(
        json_of(INDEX, lambda index: index["weight_map"].update({tensor: name})),
        "which is not a file of this folder|weights in a pickle",
    )


def files(first: str) -> dict[str, Case]:
    """Lies about weight files, and others in their place; first: a tensor of the first one."""
    return {
        "a shard outside": owner(first, "../../../etc/passwd"),
        "an absolute shard": owner(first, "/etc/passwd"),
        "a shard in a folder": owner(first, "2_Dense/model.safetensors"),
        "a pickle for a shard": owner(first, "pytorch_model.bin"),
        "a shard with a zero byte": owner(first, "a\0.safetensors"),
        "a shard that is no name": owner(first, 3),
        "a tensor in the wrong shard": Case(
            json_of(INDEX, lambda i: i["weight_map"].update({first: SECOND})),
            "but not in",
        ),
        "a shard that links outside": Case(put(FIRST, Link("/etc/passwd")), DAMAGED, VLLM),
        "a shard that links to itself": Case(put(FIRST, Link(FIRST)), "", VLLM),
        "a shard that never ends": Case(put(FIRST, Link("/dev/zero")), "is missing", VLLM),
        "a shard that is a pipe": Case(put(FIRST, FIFO), "is missing", VLLM),
        "no shard": Case(lambda files: files.pop(FIRST), "the file is missing", VLLM),
        "one more shard": Case(
            lambda files: files.update({"x.safetensors": files[FIRST]}),
            "is not part of the",
        ),
        "a run that was broken off": Case(put("precalib.job.json", b"{}"), "was interrupted"),
        **{
            f"a folder of modules {what}": Case(
                json_of("modules.json", lambda modules, path=path: modules[1].update(path=path)),
                "has no folder of this checkpoint",
            )
            for what, path in (
                ("outside", "../../etc"),
                ("with a name of 300 bytes", "é" * 150),
                ("with a name that is no text", "\ud800"),
                ("of 2,000 folders", "a/" * 2000),
            )
        },
    }


NAMES = {
    **{
        f"a type of model that is {value!r:.20}": Case(
            json_of("config.json", lambda c, value=value: c.update(model_type=value)),
            "'model_type' is .*, not a name",
        )
        for value in ([0], {}, 3, True)
    },
    **{
        f"architectures that are {value!r:.20}": Case(
            json_of("config.json", lambda c, value=value: c.update(architectures=value)),
            "'architectures' is .*, not a list of names",
        )
        for value in (7, True, "LlamaForCausalLM", [[]], {"a": 1})
    },
    "a type of model inside that is a list": Case(
        json_of("config.json", lambda c: c.update(text_config={"model_type": ["llama"]})),
        "'model_type' is .*, not a name",
    ),
}

PACKED = NAMES | headers(Q0, Q1) | CONTENTS | CONFIGURATION | MANIFEST | files(Q0)
SOURCE = (
    NAMES | headers(f"{module(0)}.weight", f"{module(1)}.weight") | files(f"{module(0)}.weight")
)
