"""One product on the CPU: packed weights beside unquantized ones and other low-bit operators.

    python benchmarks/cpu_linear.py [--isa avx2] [--size 4096] [--rounds 15] [--threads 1 2]
        [--rows 1 16 256] [--over NAME] [--fastest] [--cached]

Prints time over that of one of the unquantized products: medians of interleaved rounds, a process
for each number of threads. Weights are random; values do not matter to any of the operators.
--fastest prints ratios of the fastest rounds, too, for a machine that is shared.

Each operator has so many weights, used in turn, that they come from memory as those of a model do.
With --cached it has one, which the last-level cache may hold.

--isa takes the kernels of an ISA below the machine's, and limits torch, oneDNN and MKL to about the
same instructions, to see what a lesser machine would do. Its memory and its clock are still this
machine's. Operators that cannot be limited are left out.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.backends.x86 import library, op
from precalib_kernels.backends.x86.huge_pages import WEIGHTS
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.processor import has_bfloat16, processor_name

FLOAT32, BFLOAT16, ONEDNN = "torch float32 linear", "torch bf16 linear", "onednn_mm bf16"
# Of torch's, oneDNN's and MKL's variables, by the ISA of ours.
LIMITS = {
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CACHES, UNITS = Path("/sys/devices/system/cpu/cpu0/cache"), {"K": 10, "M": 20}

Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Operator:
    """Products with weights of their own, taken in turn; dtype: of the x that they take."""

    turns: Iterator[Product]
    dtype: torch.dtype = torch.bfloat16

    def run(self, x: Tensor) -> Tensor:
        return next(self.turns)(x)


Operators = dict[str, Operator]


@dataclasses.dataclass(frozen=True)
class Copies:
    """How many weights an operator has; cache: bytes of the last level, 0 for one weight."""

    cache: int

    def operator(
        self,
        product: Callable[..., Tensor],
        *weights: Tensor,
        dtype: torch.dtype = torch.bfloat16,
        prepare: Callable[[Tensor], Any] = torch.clone,
    ) -> Operator:
        """Of `product(x, *weights)`; the first weight is the one that is large.

        The weights of an operator exceed the cache four times: it is shared with other machines.
        """
        large, *others = weights
        count = max(2, -(-4 * self.cache // large.nbytes)) if self.cache else 1
        turns = [(prepare(large), *map(torch.clone, others)) for _ in range(count)]
        products = (self._product(product, turn) for turn in turns)
        return Operator(itertools.cycle(list(products)), dtype)

    @staticmethod
    def _product(product: Callable[..., Tensor], weights: tuple[Any, ...]) -> Product:
        return lambda x: product(x, *weights)


def last_level_cache() -> int:
    """Bytes of the largest cache that core 0 can use; 64 MiB if Linux does not say it."""
    found = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(text[:-1]) << UNITS[text[-1]] for text in found), default=64 << 20)


def packed_operators(size: int, isa: int, copies: Copies) -> Operators:
    """Ours: both default recipes, and groups of 64 with 3 salient weights (4.7 %); a recipe again
    with inputs in 8 bits, and with inputs in float32.
    """
    four = RECIPES["balanced-4"].layout
    layouts = {
        "balanced-4": four,
        "balanced-3": RECIPES["balanced-3"].layout,
        "4 bits, g 64, 4.7 %": dataclasses.replace(four, group_size=64, salient_count=3),
    }
    nibbles = library.takes_nibbles(library.supported_isas()[isa])
    plans = {
        name: X86Layout(layout, size, (size,), nibbles=nibbles) for name, layout in layouts.items()
    }
    eight = dataclasses.replace(plans["balanced-4"], int8_inputs=True)
    plans["balanced-4, 8-bit inputs"] = eight
    operators: Operators = {}
    for name, plan in plans.items():
        packed = torch.randint(0, 64, (plan.nbytes,), dtype=torch.uint8)
        finite_values(packed, plan)
        if not plan.int8_inputs:
            print(f"# {name}: {plan.nbytes / (2 * size * size):.3f} of the memory of bfloat16")
        run = functools.partial(_packed_product, plan=op.layout_tensor(plan), size=size, isa=isa)
        operators[name] = copies.operator(run, packed, prepare=in_huge_pages)
        if name == "balanced-4":
            float32 = copies.operator(run, packed, dtype=torch.float32, prepare=in_huge_pages)
            operators["balanced-4, float32 inputs"] = float32
    return operators


def _packed_product(x: Tensor, packed: Tensor, plan: Tensor, size: int, isa: int) -> Tensor:
    return op.linear(x, packed, plan, None, size, isa=isa)


def in_huge_pages(packed: Tensor) -> Tensor:
    """Where weights lie when they are served."""
    return WEIGHTS.zeros(packed.nbytes).copy_(packed)


def finite_values(packed: Tensor, plan: X86Layout) -> None:
    """Bytes below 64 are codes, positions and scales already; floating point needs values."""
    _, rows, columns, end = plan.offsets
    packed[rows:columns].view(torch.float32).fill_(0.01)
    packed[columns:end].view(torch.float16).fill_(1.0)


def unquantized_operators(size: int, copies: Copies) -> Operators:
    """torch's own products, and the one that vLLM uses for bfloat16 weights."""
    weight = torch.randn(size, size)
    half = weight.bfloat16()
    operators = {
        FLOAT32: copies.operator(linear, weight, dtype=torch.float32),
        BFLOAT16: copies.operator(linear, half),
    }
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        operators[ONEDNN] = copies.operator(
            lambda x, handler: ops.onednn_mm(handler, x, None),
            half,
            prepare=lambda weight: ops.create_onednn_mm(weight.clone().t(), 64),
        )
    except Exception as error:  # no vLLM, or a build of it without this operator
        print(f"# {ONEDNN} is left out: {first_line(error)}")
    return operators


def other_operators(size: int, limited: bool, copies: Copies, group: int = 64) -> Operators:
    """vLLM's and torch's own 4-bit operators, without salient weights or column scales.

    vLLM's W4A8 is for processors with AMX, and an illegal instruction elsewhere.
    """
    codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
    stock = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.rand(size // group, size, 2).bfloat16()
    operators = {
        "_weight_int4pack_mm_for_cpu": copies.operator(
            lambda x, weight, scales: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, weight, group, scales
            ),
            stock,
            both,
        )
    }
    if limited:
        print("# vLLM's 4-bit operators are left out: they cannot be limited to an ISA")
        return operators
    from vllm import _custom_ops as ops

    amx = torch.cpu._is_amx_tile_supported()

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    scales = torch.rand(size // group, size).bfloat16()
    zeros = words(size // group, size // 8)
    blocked = words(size // 16, size * 16 // 8)
    operators["cpu_gemm_wna16"] = copies.operator(
        lambda x, weight, scales, zeros: ops.cpu_gemm_wna16(
            x, weight, scales, zeros, None, 8, "amx" if amx else "vec"
        ),
        blocked,
        scales,
        zeros,
    )
    if amx:
        eight = ops.convert_weight_packed_scale_zp(
            words(size, size // 8), zeros, scales, ops.CPUQuantAlgo.AWQ
        )
        operators["int4_scaled_mm_cpu (W4A8)"] = copies.operator(
            lambda x, weight, zeros, scales: ops.int4_scaled_mm_cpu(x, weight, zeros, scales, None),
            *eight,
        )
    return operators


def working(operators: Operators, size: int) -> Operators:
    """Those that run here, saying why others do not."""
    good: Operators = {}
    for name, operator in operators.items():
        try:
            operator.run(torch.randn(1, size).to(operator.dtype))
            good[name] = operator
        except Exception as error:  # whatever it raises is the finding
            print(f"# {name} is left out: {first_line(error)}")
    return good


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def measure(operators: Operators, rows: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    x = torch.randn(rows, size).bfloat16()
    inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    repeat = max(1, 16 // rows)
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(rounds):
        for name, operator in operators.items():
            given = inputs[operator.dtype]
            operator.run(given)
            start = time.perf_counter()
            for _ in range(repeat):
                operator.run(given)
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def describe(isa: str, limited: bool) -> None:
    """Say what is measured."""
    model = processor_name() or "unknown processor"
    machine = library.supported_isas()[-1]
    print(f"# {model}, ISA {machine}; torch {torch.__version__}")
    if limited:
        limits = " ".join(f"{name}={os.environ.get(name, '')}" for name in VARIABLES)
        print(f"# simulated: kernels of {isa}, and {limits}")


def run(options: argparse.Namespace) -> None:
    threads, size, rows = options.threads[0], options.size, options.rows
    torch.set_num_threads(threads)
    isas = library.supported_isas()
    isa, limited = options.isa or isas[-1], options.isa is not None
    describe(isa, limited)
    copies = Copies(0 if options.cached else last_level_cache())
    kept = f"they exceed the cache of {copies.cache >> 20} MiB four times"
    print(f"# weights of each operator: {kept if copies.cache else 'one, which a cache may hold'}")
    unquantized = working(unquantized_operators(size, copies), size)
    operators = unquantized | working(packed_operators(size, isas.index(isa), copies), size)
    try:
        operators |= working(other_operators(size, limited, copies), size)
    except Exception as error:  # private operators change from release to release
        print(f"# other operators are left out: {first_line(error)}")
    over = options.over or (ONEDNN if ONEDNN in operators and has_bfloat16() else FLOAT32)
    results = {m: measure(operators, m, size, options.rounds) for m in rows}
    statistic = {"medians": statistics.median} | ({"fastest": min} if options.fastest else {})
    print(f"# time over that of {over}; {' / '.join(statistic)} of {options.rounds} rounds")
    print(
        f"| {isa}, {threads} thread(s), K = N = {size} | "
        + " | ".join(f"M = {m}" for m in rows)
        + " |"
    )
    print("|---|" + "--:|" * len(rows))
    for name in (over, *(name for name in operators if name != over)):
        cells = []
        for m in rows:
            times = [choose(results[m][name]) for choose in statistic.values()]
            if name != over:
                shown = [
                    f"{spent / choose(results[m][over]):.2f}"
                    for spent, choose in zip(times, statistic.values(), strict=True)
                ]
            else:
                shown = [f"{1e3 * spent:.2f}" for spent in times]
            cells.append(" / ".join(shown))
        print(f"| {name}{', ms' * (name == over)} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=library.supported_isas())
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--over", choices=(FLOAT32, BFLOAT16, ONEDNN))
    parser.add_argument("--fastest", action="store_true")
    parser.add_argument("--cached", action="store_true", help="one weight for each operator")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(options)
        return
    # The variables are read when libraries are loaded, so that each run is a new process.
    limits = dict(zip(VARIABLES, LIMITS.get(options.isa, ()), strict=False))
    given = [argument for argument in sys.argv[1:] if argument != "--child"]
    for threads in options.threads:
        subprocess.run(
            [sys.executable, __file__, *given, "--threads", str(threads), "--child"],
            env=os.environ | limits | {"OMP_NUM_THREADS": str(threads)},
            check=True,
        )


if __name__ == "__main__":
    main()
