"""Files of a checkpoint by pattern: which hold weights in other formats, which are remains."""

import fnmatch

from offline_quantize.checkpoint.atomic_files import JOB, JOURNAL, MANIFEST, PARTIAL, TRANSFORMS

# Reading a pickle can run code, so weights in one are refused.
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FOREIGN_WEIGHTS = (*PICKLED_WEIGHTS, "*.gguf", "*.h5", "*.msgpack", "*.onnx")
REPLACED_FILES = ("*.safetensors", "*.bin.index.json", "*.safetensors.index.json")
REMAINS = (f"*{PARTIAL}", "*.incomplete", MANIFEST, JOB, JOURNAL, TRANSFORMS)
SKIPPED_FILES = (*FOREIGN_WEIGHTS, *REPLACED_FILES, *REMAINS)


def is_skipped(name: str) -> bool:
    """Whether a file of that name, if it is no weight file in use, is left where it is."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in SKIPPED_FILES)
