"""Finds the fastest blocks on this GPU and prints a table: `python benchmarks/gpu/autotune.py`.

The printed lines replace a family's entries in
`precalib_kernels/backends/triton/launch_configs.py`. Serving never tunes: a table is fixed, so
that two runs compute alike.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench import interleaved, random_packed
from cost_model import LAYOUTS, SHAPES

from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.launch_configs import TABLE, Blocks
from precalib_kernels.format.layout import Layout


def candidates(most: int) -> Iterator[Blocks]:
    """Blocks worth trying for up to `most` rows of x."""
    widths = [width for width in (8, 16, 32, 64) if width <= max(8, most)][-2:]
    for width, (rows, warps), stages, programs_per_sm in itertools.product(
        widths, ((64, 2), (64, 4), (128, 4)), (2, 3, 4), (2, 4, 6)
    ):
        yield Blocks(rows, width, warps, stages, programs_per_sm)


def best(most: int, layout: Layout, shapes: list[str]) -> Blocks:
    """The candidate with the least geometric mean of times over the shapes at M = most.

    Candidates that this GPU cannot run, for want of shared memory, are left out.
    """
    logs: dict[Blocks, float] = dict.fromkeys(candidates(most), 0.0)
    for outputs, inputs in (SHAPES[shape] for shape in shapes):
        packed = random_packed(layout, outputs, inputs, "cuda")
        arrays = dict(zip(op.array_order(layout), packed, strict=True))
        x = torch.randn(most, inputs, dtype=torch.bfloat16, device="cuda")
        calls: dict[str, Callable[[], Any]] = {}
        for blocks in list(logs):
            call = functools.partial(op.gemm, x, arrays, None, layout, [outputs], blocks)
            try:
                call()
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's, not importable everywhere
                    raise
                del logs[blocks]
                continue
            calls[repr(blocks)] = call
        times = interleaved(calls)
        for blocks in logs:
            logs[blocks] += math.log(times[repr(blocks)])
    return min(logs, key=lambda blocks: logs[blocks])


def main() -> None:
    """Command line; leaves with a sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layout", default="balanced-4", choices=list(LAYOUTS))
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "autotune: this machine has no GPU that torch can use\n")
    print(f'    "{op.family()}": {{  # {options.layout} on {torch.cuda.get_device_name()}')
    for most in TABLE[op.family()]:
        found = best(most, LAYOUTS[options.layout], options.shape or list(SHAPES))
        values = ", ".join(str(value) for value in dataclasses.astuple(found))
        print(f"        {most}: Blocks({values}),", flush=True)
    print("    },")


if __name__ == "__main__":
    main()
