"""One product on the CPU: packed weights beside bfloat16 and vLLM's other low-bit operators.

    python benchmarks/cpu_linear.py [--size 4096] [--rounds 15] [--threads 1 2] [--rows 1 16 256]

Prints time over that of `onednn_mm` in bfloat16, which is what vLLM uses for dense weights: medians
of interleaved rounds, a process for each number of threads. Weights are random; values do not
matter to any of the operators.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.backends.x86 import op
from precalib_kernels.backends.x86.memory_layout import X86Layout

Operators = dict[str, Callable[[Tensor], Tensor]]


def packed_operators(size: int) -> Operators:
    """Ours: both default recipes, and groups of 64 with 3 salient weights (4.7 %); a recipe again
    with inputs in 8 bits, where this machine can.
    """
    four = RECIPES["balanced-4"].layout
    layouts = {
        "balanced-4": four,
        "balanced-3": RECIPES["balanced-3"].layout,
        "4 bits, g 64, 4.7 %": dataclasses.replace(four, group_size=64, salient_count=3),
    }
    plans = {name: X86Layout(layout, size, (size,)) for name, layout in layouts.items()}
    plans["balanced-4, 8-bit inputs"] = X86Layout(four, size, (size,), int8_inputs=True)
    operators: Operators = {}
    for name, plan in plans.items():
        packed = torch.randint(0, 64, (plan.nbytes,), dtype=torch.uint8)
        finite_values(packed, plan)
        print(f"# {name}: {plan.nbytes / (2 * size * size):.3f} of the memory of bfloat16")
        operators[name] = functools.partial(
            _packed_product, packed=packed, plan=op.layout_tensor(plan), size=size
        )
    return operators


def _packed_product(x: Tensor, packed: Tensor, plan: Tensor, size: int) -> Tensor:
    return op.linear(x, packed, plan, None, size, isa=-1)


def finite_values(packed: Tensor, plan: X86Layout) -> None:
    """Bytes below 64 are codes, positions and scales already; floating point needs values."""
    _, rows, columns, end = plan.offsets
    packed[rows:columns].view(torch.float32).fill_(0.01)
    packed[columns:end].view(torch.float16).fill_(1.0)


def dense_operator(size: int) -> Operators:
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_mm(torch.randn(size, size).bfloat16().t(), 64)
    return {"onednn_mm bf16": lambda x: ops.onednn_mm(handler, x, None)}


def other_operators(size: int, group: int = 64) -> Operators:
    """vLLM's and torch's own 4-bit operators, without salient weights or column scales.

    vLLM's W4A8 is for processors with AMX, and an illegal instruction elsewhere.
    """
    from vllm import _custom_ops as ops

    amx = torch.cpu._is_amx_tile_supported()

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    scales = torch.rand(size // group, size).bfloat16()
    zeros = words(size // group, size // 8)
    blocked = words(size // 16, size * 16 // 8)
    codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
    stock = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.rand(size // group, size, 2).bfloat16()
    operators: Operators = {
        "cpu_gemm_wna16": lambda x: ops.cpu_gemm_wna16(
            x, blocked, scales, zeros, None, 8, "amx" if amx else "vec"
        ),
        "_weight_int4pack_mm_for_cpu": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, stock, group, both
        ),
    }
    if amx:
        eight = ops.convert_weight_packed_scale_zp(
            words(size, size // 8), zeros, scales, ops.CPUQuantAlgo.AWQ
        )
        operators["int4_scaled_mm_cpu (W4A8)"] = lambda x: ops.int4_scaled_mm_cpu(x, *eight, None)
    return operators


def working(operators: Operators, size: int) -> Operators:
    """Those that run here, saying why others do not."""
    good: Operators = {}
    for name, operator in operators.items():
        try:
            operator(torch.randn(1, size).bfloat16())
            good[name] = operator
        except Exception as error:  # whatever it raises is the finding
            print(f"# {name} does not run here: {str(error).splitlines()[0]}")
    return good


def measure(operators: Operators, rows: int, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of each, round by round."""
    x = torch.randn(rows, size).bfloat16()
    repeat = max(1, 16 // rows)
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(rounds):
        for name, operator in operators.items():
            operator(x)
            start = time.perf_counter()
            for _ in range(repeat):
                operator(x)
            seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run(threads: int, size: int, rounds: int, rows: list[int]) -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.set_num_threads(threads)
    operators = dense_operator(size) | working(packed_operators(size), size)
    try:
        operators |= working(other_operators(size), size)
    except Exception as error:  # private operators change from release to release
        print(f"# other operators cannot be prepared: {str(error).splitlines()[0]}")
    results = {count: measure(operators, count, size, rounds) for count in rows}
    print(f"| {threads} thread(s), K = N = {size} | " + " | ".join(f"M = {m}" for m in rows) + " |")
    print("|---|" + "--:|" * len(rows))
    dense = "onednn_mm bf16"
    print(f"| {dense}, ms | " + " | ".join(f"{1e3 * results[m][dense]:.2f}" for m in rows) + " |")
    for name in operators:
        if name != dense:
            ratios = " | ".join(f"{results[m][name] / results[m][dense]:.2f}" for m in rows)
            print(f"| {name} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    options = parser.parse_args()
    if len(options.threads) == 1:
        run(options.threads[0], options.size, options.rounds, options.rows)
        return
    for threads in options.threads:
        common = ["--size", options.size, "--rounds", options.rounds, "--rows", *options.rows]
        subprocess.run(
            [sys.executable, __file__, "--threads", str(threads), *map(str, common)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
        )


if __name__ == "__main__":
    main()
