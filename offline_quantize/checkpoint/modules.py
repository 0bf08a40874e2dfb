"""Folders of sentence-transformers modules, whose weights lie beside those of the model.

`modules.json` lists what follows the model: pooling, a projection ("Dense"), a normalization. vLLM
reads a projection from its folder and leaves it out without a word if it is not there.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from offline_quantize.checkpoint.atomic_files import parse_json
from offline_quantize.checkpoint.file_patterns import is_inside
from precalib_kernels.errors import SourceError

MODULES = "modules.json"


def module_folders(directory: Path) -> tuple[str, ...]:
    """Folders of the modules of a checkpoint but for the model itself, as "2_Dense".

    Raises SourceError for a damaged modules.json, for a folder outside of the checkpoint, and for
    a projection without weights, as are those in a pickle.
    """
    path = directory / MODULES
    if not path.is_file():
        return ()
    found = []
    for module in _listed(path):
        folder = module.get("path", "") if isinstance(module, dict) else None
        if not isinstance(folder, str) or not is_inside(folder):
            raise SourceError(
                f"{path}: module {json.dumps(module)[:80]} has no folder of this checkpoint; "
                "download the checkpoint again"
            )
        if folder not in ("", "."):
            found.append(PurePosixPath(folder).as_posix())
            if str(module.get("type")).endswith(".Dense"):
                _check_projection(directory / folder)
    return tuple(found)


def _listed(path: Path) -> list[Any]:
    modules = parse_json(path, SourceError, "download the checkpoint again")
    if isinstance(modules, dict):
        modules = modules.get("modules", [])
    if not isinstance(modules, list):
        raise SourceError(f"{path}: not a list of modules; download the checkpoint again")
    return modules


def _check_projection(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise SourceError(
            f"{folder}: this part of the model has no *.safetensors weights, and weights in a "
            "pickle can run code when they are read; convert it to safetensors "
            "(SentenceTransformer's save_pretrained does), as embeddings would lack it"
        )
