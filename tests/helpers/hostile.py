"""Small checkpoints as files in memory, damaged in a folder, and used in every way there is.

Whatever stands in the files, a use ends in a PrecalibError of one sentence, in faults that
`verify` tells, or in the right result; never in another exception, endless time or memory.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.cli import inspection
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.quantize import quantize
from offline_quantize.commands.verify import verify
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import PrecalibError

ROWS, COLUMNS = 8, 128
RECIPES = ("balanced-4", "paper-4", "rtn-4", "balanced-2")  # one per layer
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": COLUMNS,
    "text_config": {},
}
# Ways to quantize that read more of a source than others.
OPTIONS = (
    Options("rtn-4", overrides=[(r"layers\.0\.", "balanced-4")]),
    Options(target_bits=5.2),
    Options("rtn-4", embeddings="balanced-5", head="balanced-5"),
)


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    to: str


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A file that begins with `data` and then has `zeros` zeros, which take no disk."""

    data: bytes
    zeros: int


FIFO, FOLDER = object(), object()  # in place of a file
Files = dict[str, Any]  # bytes, Link, Sparse, FIFO or FOLDER, by name


def module(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def source_files() -> Files:
    """A checkpoint of four layers in two weight files, with a projection in a folder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    parts = [
        {f"{module(i)}.weight": random(ROWS, COLUMNS) for i in pair} for pair in ((0, 1), (2, 3))
    ]
    parts[0]["model.embed_tokens.weight"] = random(4, 32)
    parts[1]["model.norm.weight"] = random(COLUMNS)
    weight_map = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]
    return {
        **{file: save(part, {"format": "pt"}) for file, part in zip(SHARDS, parts, strict=True)},
        "config.json": json.dumps(CONFIG).encode(),
        INDEX: json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        "modules.json": json.dumps(modules).encode(),
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": save({"linear.weight": random(2, 4)}),
    }


def packed_files(folder: Path) -> Files:
    """The same, packed, each layer by another recipe; `folder` is used meanwhile."""
    source, target = Sandbox(folder / "source", source_files()), folder / "packed"
    overrides = [(rf"layers\.{i}\.", recipe) for i, recipe in enumerate(RECIPES)]
    plan = make_plan(open_checkpoint(source.root), Options("rtn-4", overrides=overrides))
    quantize(plan, target, NullProgress())
    files = {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return files


class Sandbox:
    """A folder that holds given files, and others for a while."""

    def __init__(self, root: Path, files: Mapping[str, Any]) -> None:
        self.root, self.files = root, dict(files)
        for name, data in files.items():
            self._write(name, data)

    def damaged(self, files: Mapping[str, Any]) -> "Damaged":
        """A context in which the folder holds `files`."""
        return Damaged(self, files)

    def _write(self, name: str, data: Any) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Link):
            path.symlink_to(data.to)
        elif data is FIFO:
            os.mkfifo(path)
        elif data is FOLDER:
            path.mkdir()
        elif isinstance(data, Sparse):
            path.write_bytes(data.data)
            os.truncate(path, len(data.data) + data.zeros)
        else:
            path.write_bytes(data)

    def _remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def replace(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Make the folder hold `new` where it holds `old`."""
        for name in old.keys() | new.keys():
            if old.get(name) is new.get(name):
                continue
            if name in old:
                self._remove(name)
            if name in new:
                self._write(name, new[name])


class Damaged:
    def __init__(self, box: Sandbox, files: Mapping[str, Any]) -> None:
        self.box, self.files = box, files

    def __enter__(self) -> Path:
        self.box.replace(self.box.files, self.files)
        return self.box.root

    def __exit__(self, *_: object) -> None:
        self.box.replace(self.files, self.box.files)


def use_packed(root: Path) -> str:
    """What `inspect`, `verify` and whoever reads weights make of a packed checkpoint."""
    packed, manifest = open_packed(root), read_manifest(root)
    json_bytes(inspection.contents(packed, manifest))
    faults = list(verify(root, None, NullProgress()))
    assert all(fault.strip() for fault in faults)
    if faults:
        return "faults"
    assert packed.bits_per_weight > 0
    for name in packed.config.modules:
        assert bool(packed.weight(name).isfinite().all())
    return "loads"


def use_dequantized(root: Path, target: Path) -> str:
    """What `dequantize` makes of a packed checkpoint, and `quantize --dry-run` of that."""
    try:
        dequantize(root, target, torch.bfloat16, 1, NullProgress())
        make_plan(open_checkpoint(target), Options("rtn-4"))
        return "loads"
    finally:
        shutil.rmtree(target, ignore_errors=True)


def use_source(root: Path, target: Path, write: bool, options: Options = OPTIONS[0]) -> str:
    """What `quantize` makes of a source checkpoint; write: or only what its dry run makes of it."""
    plan = make_plan(open_checkpoint(root), options)
    json_bytes(plan.record().to_json())
    assert plan.output_bytes > 0
    if not write:
        return "plans"
    try:
        quantize(plan, target, NullProgress())
        assert list(verify(target, root, NullProgress())) == []
        return "loads"
    finally:
        shutil.rmtree(target, ignore_errors=True)


def outcome(use: Callable[[], str]) -> tuple[str, str]:
    """How a use ended, and the sentence if it was refused. Other exceptions are raised."""
    try:
        return use(), ""
    except PrecalibError as error:
        text = str(error)
        assert text.strip()
        assert len(text) < 5000, f"{text[:300]} … {text[-100:]}"
        return "refused", text


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, tensors: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, JSON value or text, and the bytes of its tensors.

    length: what the first eight bytes say in place of the header's length.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    said = len(text) if length is None else length
    return (said % (1 << 64)).to_bytes(8, "little") + text + tensors
