"""Quantize a checkpoint far larger than memory should need, and report the peak of memory.

    python tests/offline_quantize/commands/large_checkpoint.py [--recipe rtn-4 ...]
        [--layers 14] [--jobs 1]

Writes one file of about 8 GB with the layer shapes of Llama-3-8B to a temporary folder, runs
`precalib quantize` on it in a process of its own, and prints the peak resident memory of that
process (`ru_maxrss`) and of one that only imports the program. Needs 14 GB of disk; everything is
removed afterwards. Takes minutes, so it is not a test; the tests do the same with 300 MB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from offline_quantize.checkpoint.safetensors_file import lay_out, tensor_bytes, write_at

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 128256
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def write_checkpoint(folder: Path, layers: int) -> int:
    """One bfloat16 file; returns its size."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in LINEARS.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    layout = lay_out({n: ("BF16", s, 2 * s[0] * s[1]) for n, s in shapes.items()}, {})
    generator = torch.Generator().manual_seed(0)
    noise = tensor_bytes((torch.randn(1 << 24, generator=generator) * 0.02).bfloat16())
    folder.mkdir()
    descriptor = os.open(folder / "model.safetensors", os.O_RDWR | os.O_CREAT, 0o644)
    write_at(descriptor, layout.header, 0)
    for entry in layout.entries.values():
        for begin in range(entry.begin, entry.end, len(noise)):
            write_at(descriptor, noise[: entry.end - begin], begin)
    os.close(descriptor)
    config = {"model_type": "llama", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return layout.size


def peak_of(*command: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of a Python process."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=["rtn-4", "balanced-4"])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    baseline, _ = peak_of("-c", "import offline_quantize.cli.main")
    print(f"importing the program: {baseline / 1e9:.2f} GB", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        print(f"source: {write_checkpoint(source, arguments.layers) / 1e9:.2f} GB", flush=True)
        for recipe in arguments.recipe:
            options = ["--recipe", recipe, "--jobs", str(arguments.jobs)]
            peak, seconds = peak_of(
                "-m", "offline_quantize.cli.main", "quantize", str(source), str(target), *options
            )
            print(f"{recipe}: peak {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
