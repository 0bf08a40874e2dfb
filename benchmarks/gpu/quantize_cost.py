"""What `precalib quantize --device cuda` costs on a GPU, counted: `quantize_cost.py`.

A weight is encoded on the CPU the way it would be on a GPU, in the GPU's blocks, and every operator
of torch that it goes through is counted: a kernel, which reads its inputs and writes its results
once. The trellis search and error feedback are counted in their compiled code. Times are the counts
over a chip's figures, as if nothing overlapped: bytes over bandwidth plus launches times LAUNCH.
Operators that sort read more than that and are marked. Reading files, copying, hashing and writing
are left out.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import aot_compile
import instruction_count
import torch
from aot_compile import Compiled
from cost_model import CHIPS, Chip, Cost, integer_operations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offline_quantize.method import (
    encode,
    feedback_torch,
    feedback_triton,
    trellis,
    trellis_triton,
)
from offline_quantize.method.recipes import RECIPES

POINTERS = {
    "weights": "fp32", "unit": "fp32", "low_bits": "i32", "importance": "fp32",
    "value_table": "i32", "rank_table": "i32", "survivors": "i32", "codes": "i32",
    "entries": "fp32", "least_cost": "fp32",
}  # fmt: skip
FEEDBACK_POINTERS = {
    **dict.fromkeys(("target", "weight", "effects", "importance", "unit", "step"), "fp32"),
    **dict.fromkeys(("salient_inverse", "salient_scale", "salient_offset"), "fp32"),
    **dict.fromkeys(("moved", "values", "block_errors", "loss"), "fp32"),
    **dict.fromkeys(("value_table", "rank_table", "words", "ways", "ends"), "i32"),
    "mask": "u8",
}
LAUNCH = 5e-6  # seconds that a CPU takes to start a kernel through torch, an assumption
SORTING = ("aten.topk", "aten.sort", "aten.kthvalue", "aten.argmin", "aten.bincount", "aten.histc")
MODEL = 6.98e9  # weights of Llama-3-8B's linear layers; its head and embeddings stay as they are


@dataclasses.dataclass
class Counts:
    """Kernels and the bytes that they read and write, by the name of the operator."""

    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: Counter[str] = dataclasses.field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts every operator that makes or changes a tensor's data; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        known = {each.untyped_storage().data_ptr() for each in given}
        writes = [each for each in made if each.untyped_storage().data_ptr() not in known]
        if writes or func._schema.is_mutable:
            name = str(func).rpartition(".")[0]
            self.counts.kernels[name] += 1
            self.counts.bytes[name] += sum(map(size, given)) + sum(map(size, made))
        return result


def size(tensor: Tensor) -> int:
    """Bytes of memory that an operator touches for a tensor: once where it is expanded."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def search_cost(weighted: bool, target: str, group_size: int = 128) -> Cost:
    """The trellis search per weight: a thread's way through a group and back, eight at a turn.

    bits: weights and importances in float32, given low bits, points and codes written, points read,
    four survivors a weight written and read, values in float32.
    """
    constants = {"LIMIT": 127, "WEIGHTED": weighted, "GROUPS": trellis_triton.GROUPS}
    compiled = aot_compile.compile_kernel(
        trellis_triton.search_kernel,
        constants | {"SIZE": group_size},
        target,
        {"num_warps": trellis_triton.WARPS, "enable_fp_fusion": False},
        POINTERS,
    )
    forward, back = instruction_count.loops(compiled)
    counters: list[Callable[[instruction_count.Loop], int]] = [
        lambda loop: len(loop.operations),
        integer_operations,
    ]
    each, integer = ((count(forward) + count(back)) / 8 for count in counters)
    bits = 32 + 32 * weighted + 8 + 3 * 8 + 2 * 4 + 32
    return Cost(each, 1, bits, compiled, integer)


@dataclasses.dataclass(frozen=True)
class FeedbackCost:
    """Thread-instructions per weight of error feedback.

    search: of all candidates for the scales, in a group of 128;  push: for each column after it.
    """

    search: float
    push: float
    compiled: tuple[Compiled, Compiled]

    def seconds(self, chip: Chip, columns: int) -> float:
        """For MODEL weights in rows of so many columns, if every instruction slot were used."""
        instructions = self.search + self.push * columns / 2
        return max(chip.seconds(0, MODEL * instructions, 0).values())


def feedback_cost(target: str, group_size: int = 128) -> FeedbackCost:
    """A column's step in the search, and what a block moves in its group; then later columns."""
    block = feedback_torch.BLOCK
    rows, columns = feedback_triton.PUSH_ROWS, feedback_triton.PUSH_COLUMNS
    search, push = (
        aot_compile.compile_kernel(
            kernel, constants | {"BLOCK": block}, target,
            {"num_warps": warps, "enable_fp_fusion": False}, FEEDBACK_POINTERS,
        )
        for kernel, constants, warps in (
            (
                feedback_triton.search_kernel,
                {"LIMIT": 127, "SALIENT": True, "SIGN": False, "ROWS": feedback_triton.ROWS},
                feedback_triton.ROWS // 32,
            ),
            (feedback_triton.push_kernel, {"ROWS": rows, "COLUMNS": columns}, rows // 32),
        )
    )  # fmt: skip
    step, moved = (
        max(len(loop.operations) for loop in instruction_count.loops(search) if kind(loop))
        for kind in (lambda loop: loop.counts()["F2I"], lambda loop: not loop.counts()["F2I"])
    )
    blocks = group_size // block
    later = blocks * (blocks - 1) / 2  # pairs of a block and a later one
    each = max(len(loop.operations) for loop in instruction_count.loops(push))
    searched = step + later * block * moved / group_size
    return FeedbackCost(len(encode.SHRINKS) * searched, each / columns, (search, push))


def count_encoding(recipe: str, rows: int, columns: int, in_torch: bool) -> Counts:
    """Operators of encoding one weight; with `in_torch` those of the search in torch as well."""
    weight = torch.randn(rows, columns).bfloat16()

    def elsewhere(weights: Tensor, unit: Tensor, low_bits: Tensor, *_: Any) -> trellis.Paths:
        found = torch.zeros_like(low_bits), torch.zeros_like(weights), torch.zeros_like(unit[0])
        return trellis.best_of(lambda _: found, unit)  # all but the kernel

    kept = trellis.search, encode.BLOCK_WEIGHTS
    trellis.search = trellis.search_torch if in_torch else elsewhere  # type: ignore[assignment]
    encode.BLOCK_WEIGHTS = encode.GPU_BLOCK_WEIGHTS
    try:
        with Counting() as counting:
            encode.encode_unchecked(weight, RECIPES[recipe], "counted")
            counts: Counts = counting.counts
    finally:
        trellis.search, encode.BLOCK_WEIGHTS = kept
    return counts


def report(recipe: str, rows: int, columns: int, in_torch: bool) -> None:
    """Print counts per weight, and what they come to for a model."""
    counts, weights = count_encoding(recipe, rows, columns, in_torch), rows * columns
    launches, total = counts.kernels.total(), counts.bytes.total()
    print(f"{recipe}, one weight of {rows} x {columns}: {launches} kernels, ", end="")
    print(f"{total / weights:.0f} bytes per weight")
    for name, count in counts.bytes.most_common(12):
        mark = " (sorts)" if name.startswith(SORTING) else ""
        print(f"  {name}{mark}: {counts.kernels[name]} kernels, {count / weights:.1f} bytes")
    for chip in CHIPS:
        if not chip.target.startswith("sm_"):
            continue
        of_bytes = total / weights * MODEL / chip.terabytes / 1e12
        of_launches = launches / weights * MODEL * LAUNCH
        line = f"{chip.name}: {MODEL:.3g} weights: {of_bytes:.1f} s of bandwidth + "
        line += f"{of_launches:.1f} s of launches"
        if not in_torch:
            cost = search_cost(False, chip.target)
            times = chip.seconds(MODEL * cost.bits / 8, MODEL * cost.instructions, 0)
            scales = len(encode.SHRINKS)
            line += f" + search {scales * max(times.values()):.2f} s ({scales} times "
            line += f"{cost.instructions:.0f} instructions, {cost.bits / 8:.0f} bytes per weight)"
        print(line, flush=True)
        if not in_torch:
            feedback = feedback_cost(chip.target)
            print(
                f"  with error feedback {feedback.seconds(chip, columns):.1f} s more "
                f"({feedback.search:.0f} instructions per weight, "
                f"{feedback.push:.1f} for each later column)",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="balanced-4", choices=list(RECIPES))
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096])
    parser.add_argument("--torch", action="store_true", help="with the search in torch")
    options = parser.parse_args()
    rows, columns = options.shape
    report(options.recipe, rows, columns, options.torch)


if __name__ == "__main__":
    main()
