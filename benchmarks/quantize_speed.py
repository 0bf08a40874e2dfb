"""Seconds to quantize one checkpoint: precalib's recipes and its peers, interleaved rounds.

    python benchmarks/quantize_speed.py [SOURCE] [--rounds 3] [--peers-python PYTHON]

Without SOURCE it makes a random checkpoint of two layers with the shapes of Llama-3.2-1B (243 MB).

Each method is a process of its own, timed inside without imports, from files to files:
`precalib quantize --activations none` with rtn-4, balanced-4 and paper-4 (all cores), and
llm-compressor's data-free `model_free_ptq` W4A16 with as many workers. auto-adpq works in memory
and takes hours for a model: it gets one matrix of layer 0 (k_proj), beside paper-4's encoder on the
same and one thread.

--peers-python names the interpreter that has `llmcompressor` and `auto-adpq` (their pins exclude
ours); without it only precalib is timed. Prints a table of medians and of ratios to rtn-4.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OURS = ("rtn-4", "balanced-4", "paper-4")
SMALL = "model.layers.0.self_attn.k_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-python")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"seconds": CHILDREN[options.child](options.source, options.recipe)}))
        return
    methods = [(sys.executable, "precalib", name) for name in OURS]
    if options.peers_python:
        methods.append((options.peers_python, "llmcompressor", "W4A16"))
        methods.append((options.peers_python, "auto-adpq", "k_proj"))
        methods.append((sys.executable, "encoder", "paper-4"))
    with tempfile.TemporaryDirectory() as work:
        source = options.source or synthetic(Path(work) / "llama")
        report(measure(methods, source, options.rounds))


def measure(
    methods: list[tuple[str, str, str]], source: Path, rounds: int
) -> dict[tuple[str, str], list[float]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for python, child, recipe in methods:
            seconds.setdefault((child, recipe), []).append(run(python, child, recipe, source))
    return seconds


def synthetic(directory: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    shapes = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.{name}.weight": (
            0.02 * torch.randn(shape, generator=generator)
        ).bfloat16()
        for layer in range(2)
        for name, shape in shapes.items()
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def run(python: str, child: str, recipe: str, source: Path) -> float:
    command = [python, __file__, str(source), "--child", child, "--recipe", recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{child} {recipe} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def report(seconds: dict[tuple[str, str], list[float]]) -> None:
    base = statistics.median(seconds["precalib", "rtn-4"])
    print("| method | median s | all rounds | × rtn-4 |\n|---|---|---|---|")
    for (child, recipe), values in seconds.items():
        median = statistics.median(values)
        rounds = ", ".join(f"{value:.2f}" for value in values)
        ratio = "" if child in ("auto-adpq", "encoder") else f"{median / base:.2f}"
        print(f"| {child} {recipe} | {median:.2f} | {rounds} | {ratio} |")
    if ("auto-adpq", "k_proj") in seconds:
        ratios = [
            theirs / ours
            for theirs, ours in zip(
                seconds["auto-adpq", "k_proj"], seconds["encoder", "paper-4"], strict=True
            )
        ]
        print(f"\nauto-adpq / paper-4 on one k_proj, one thread: {statistics.median(ratios):.0f} ×")


def time_precalib(source: Path, recipe: str) -> float:
    from offline_quantize import quantize_checkpoint

    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        quantize_checkpoint(source, Path(work) / "out", recipe, activations="none")
        return time.perf_counter() - start


def time_llmcompressor(source: Path, scheme: str) -> float:
    from llmcompressor import model_free_ptq

    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        model_free_ptq(
            str(source),
            str(Path(work) / "out"),
            scheme=scheme,
            ignore=["re:.*embed_tokens.*", "re:.*norm.*", "lm_head"],
            max_workers=len(os.sched_getaffinity(0)),
            device="cpu",
        )
        return time.perf_counter() - start


def layer_weights(source: Path) -> "dict[str, Tensor]":
    from safetensors import safe_open

    found = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name == SMALL:
                    found[name] = file.get_tensor(name)
    return found


def time_auto_adpq(source: Path, _: str) -> float:
    from auto_adpq import Auto_AdpQ

    weights = layer_weights(source)
    quantizer = Auto_AdpQ(group_size=128, alpha=0.08, q_bit=4, device="cpu")
    start = time.perf_counter()
    for weight in weights.values():
        rows = weight.float().numpy()
        # its groups are whole, so a ragged last group is left out, to its advantage
        quantizer.AdpQ_quantize(rows[:, : rows.shape[1] // 128 * 128])
    return time.perf_counter() - start


def time_encoder(source: Path, recipe: str) -> float:
    import torch

    from offline_quantize import quantize_weight

    torch.set_num_threads(1)
    weights = layer_weights(source)
    start = time.perf_counter()
    for name, weight in weights.items():
        quantize_weight(weight, recipe, name=name)
    return time.perf_counter() - start


CHILDREN = {
    "precalib": time_precalib,
    "llmcompressor": time_llmcompressor,
    "auto-adpq": time_auto_adpq,
    "encoder": time_encoder,
}

if __name__ == "__main__":
    main()
