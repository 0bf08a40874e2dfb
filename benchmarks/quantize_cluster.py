"""Seconds to quantize experts on one and two Ray nodes of one CPU each, beside threads.

    python benchmarks/quantize_cluster.py [--matrices 16] [--rounds 1] [--recipe balanced-4]

The checkpoint has matrices [2048, 7168] in bfloat16, as the experts of DeepSeek-V3. Seconds are
those that `precalib quantize` prints: from files to files, with the SHA-256 of the result and, on a
cluster, the start of its workers, which import torch. Both nodes are on this machine and share its
memory and disk. It needs two idle cores.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from offline_quantize import quantize_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from ray_cluster import ENVIRONMENT, RayCluster

ROWS, COLUMNS = 2048, 7168


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recipe", default="balanced-4")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as work:
        source = experts(Path(work) / "source", options.matrices)
        clusters = {count: RayCluster(count) for count in (1, 2)}
        ways: dict[str, dict[str, Any]] = {
            "--jobs 1": {"jobs": 1},
            "one node": {"ray": clusters[1].address},
            "two nodes": {"ray": clusters[2].address},
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        try:
            for _ in range(options.rounds):
                for way, where in ways.items():
                    seconds[way].append(measure(source, options.recipe, where))
        finally:
            for cluster in clusters.values():
                cluster.stop()
    weights = options.matrices * ROWS * COLUMNS
    print(f"{weights:,} weights; {options.recipe}; medians of {options.rounds} rounds")
    for way, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{way}: {median:.2f} s, {weights / median / 1e6:.2f} million weights per second")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory of this process, which ran --jobs 1: {peak:,.0f} MB")


def experts(folder: Path, count: int) -> Path:
    """A checkpoint of one layer of experts, all of them with the same values."""
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
    folder.mkdir()
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(count)]
    save_file({name: matrix.clone() for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return folder


def measure(source: Path, recipe: str, where: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory(dir=source.parent) as target:
        done = quantize_checkpoint(source, target, recipe, activations="none", card=False, **where)
    assert done.seconds is not None
    return done.seconds


if __name__ == "__main__":
    main()
