"""Makes the tiny packed checkpoint of one release, which later releases must read.

    python tests/upgrade/make_checkpoint.py tests/upgrade/checkpoints/VERSION

Run it with the release installed, once, when it is released. `weights.json` beside the checkpoint
has a digest of every weight as that release dequantizes it.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Every kind of layout: codebooks with a trellis, min-max grids with salient weights, plain ones.
OPTIONS = (
    *("--recipe", "balanced-4", "--head", "balanced-5"),
    *("--override", r"layers\.1\.self_attn\.[qkv]=rtn-4", "--override", "gate|up=paper-4"),
    *("--override", r"layers\.1\.mlp\.down=balanced-3", "--override", r"layers\.1\..*o_proj=rtn-3"),
)


def main() -> None:
    """Write the checkpoint and the digests."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as source:
        model(source)
        command = [sys.executable, "-c", ENTRY, "quantize", source, str(target)]
        subprocess.run([*command, *OPTIONS], check=True)
    (target.parent / f"{target.name}.json").write_text(json.dumps(digests(target), indent=1) + "\n")


ENTRY = """
try:
    from offline_quantize.cli.main import main
except ImportError:  # as it was called at 0.1.0
    from offline_quantize.cli import main
main()
"""


def model(folder: str) -> None:
    """A random llama whose answers are far from uniform."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():
        parameter.data *= 5 if parameter.ndim == 2 else 1
    made.bfloat16().save_pretrained(folder)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of the float32 bytes of every packed weight, by module."""
    try:
        from offline_quantize.checkpoint.packed import open_packed
    except ImportError:
        from offline_quantize.packed import open_packed  # type: ignore[no-redef]
    packed = open_packed(directory)
    return {
        module: hashlib.sha256(packed.weight(module).contiguous().numpy().tobytes()).hexdigest()
        for module in sorted(packed.config.modules)
    }


if __name__ == "__main__":
    main()
