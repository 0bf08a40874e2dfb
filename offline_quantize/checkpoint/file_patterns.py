"""Files of a checkpoint by pattern: what a server needs, what is fetched, what is never copied.

A name is looked up in full, relative to the checkpoint; "*" also stands for folders in between.
"""

import fnmatch
import os
from pathlib import PurePosixPath

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL, MANIFEST, PARTIAL, TRANSFORMS

WEIGHTS = "*.safetensors"
# Reading a pickle can run code, so weights in one are refused.
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What vLLM, transformers and sentence-transformers read beside weights, and licences.
CARRIED_FILES = (
    "*.json",  # configurations, tokenizers, indices of modules
    "*.jinja",  # chat templates
    "*.py",  # code of the checkpoint; never run here
    "*.txt",  # vocabularies, merges
    "*.model",  # sentencepiece
    "*tokenizer.model.v*",  # of Mistral
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.vocab",
    "*.yaml",
    "*.yml",
    "*.md",
    "*LICENSE*",
    "*LICENCE*",
    "*NOTICE*",
    "*COPYING*",
)
# Folders of the same model for other programs, whose small files no server of it reads.
FOREIGN_FOLDERS = ("onnx", "openvino", "coreml", "gguf", "ggml", "original", "tflite", "mlx")
# Made anew for the output, or remains of an earlier run.
REPLACED_FILES = ("*.bin.index.json", "*.safetensors.index.json")
REMAINS = (f"*{PARTIAL}", "*.incomplete", MANIFEST, JOB, JOURNAL, TRANSFORMS)
# An adapter's own files, by which loaders would take the whole folder for an adapter.
ADAPTER_FILES = ("adapter_config.json", "adapter_model*")
# What a download takes and what it leaves; a name of both is left.
DOWNLOADED = (*CARRIED_FILES, WEIGHTS)
MAX_NAME, MAX_PART_BYTES = 1000, 255  # of names in a checkpoint; file systems take no longer parts
NOT_DOWNLOADED = (*(f"{folder}/*" for folder in FOREIGN_FOLDERS), "consolidated*.safetensors")


def is_carried(name: str) -> bool:
    """Whether a file, if it is no weight file in use, is copied to the output.

    name: relative to the checkpoint, as "assets/vocab.txt".
    """
    path = PurePosixPath(name)
    if path.parts[0].lower() in FOREIGN_FOLDERS and len(path.parts) > 1:
        return False
    return _matches(name, CARRIED_FILES) and not _matches(
        path.name, (*REPLACED_FILES, *REMAINS, *ADAPTER_FILES)
    )


def is_carried_in_module(name: str) -> bool:
    """The same for a file in the folder of a sentence-transformers module, weights included."""
    return not _matches(name, (*PICKLED_WEIGHTS, *REMAINS))


def is_inside(name: str) -> bool:
    """Whether a relative name is one of a file or folder in the folder that it is relative to."""
    path = PurePosixPath(name)
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeEncodeError:
        return False
    short = longest <= MAX_PART_BYTES and len(name) <= MAX_NAME
    return short and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
