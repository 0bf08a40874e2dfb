"""A checkpoint of one weight file, divided into several with an index."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def split_weight_file(root: Path, count: int) -> None:
    """Deal the tensors of `model.safetensors` out in turns, so that no layer lies in one file."""
    tensors = load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, root / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    text = {"metadata": {}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(text))
