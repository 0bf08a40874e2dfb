"""What the GPU kernels cost, from their compiled code: `python benchmarks/gpu/cost_model.py`.

For every entry of the configuration table the kernel is compiled ahead of time, and the
instructions of its loops are counted. The time of a product is taken to be the largest of

    bytes of the weight's in-memory form / memory bandwidth,
    thread-instructions / (multiprocessors · lanes · clock),
    instructions of the integer and logic pipe / half of that,
    tensor-core operations of the padded blocks / tensor-core peak,

as if loads, instructions and tensor cores overlapped perfectly and nothing else cost anything:
launches, the kernel that prepares x, split sums, latency, and activations are left out. So it
is a lower bound that compares kernels, no forecast: on an H200 kernels took 1.5 to 3 times as long
at few rows of x (benchmarks/results/gpu-h200.md).
"""

import argparse
import dataclasses
from collections.abc import Iterator

import aot_compile
import instruction_count

from precalib_kernels.backends.triton.gather_op import BLOCK_IDS
from precalib_kernels.backends.triton.launch_configs import TABLE, Blocks, blocks_for, family_of
from precalib_kernels.backends.triton.memory_layout import (
    SALIENT_CHUNK,
    SALIENT_UNROLL,
    triton_layout,
)
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout


def _trellis(bits: int, slots: int, salient_bits: int) -> Layout:
    return Layout(
        bits, 128, TRELLIS_CODEBOOKS[bits], True, "log8", slots, salient_bits, "row",
        column_scale=True
    )  # fmt: skip


LAYOUTS = {
    "balanced-5": _trellis(5, 2, 8),
    "balanced-4": _trellis(4, 2, 8),
    "balanced-3": _trellis(3, 4, 7),
    "balanced-2": _trellis(2, 4, 6),
    "uniform-4": Layout(4, 128, salient_count=2),
    "table-4": Layout(4, 128, tuple(range(-120, 121, 16)), salient_count=2),
    "uniform-3": Layout(3, 128, salient_count=2),
    "uniform-5": Layout(5, 128, salient_count=2),
    "table-5": Layout(5, 128, tuple(range(-124, 125, 8)), salient_count=2),
    "paper-4": Layout(4, 128, salient_count=16, salient_bits=4, salient_grid="min-max"),
    "paper-table-4": Layout(
        4,
        128,
        tuple(range(-120, 121, 16)),
        salient_count=16,
        salient_bits=4,
        salient_grid="min-max",
    ),
}
# Half the lanes of a multiprocessor run these, on compute capability 8.0 to 9.0.
INTEGER = frozenset(
    "LOP3 SHF PRMT LEA ISETP FSETP PLOP3 FSEL SEL IADD3 VIADD IMNMX VIMNMX FMNMX P2R".split()  # noqa: SIM905
)
SHAPES = {  # Llama-3-8B: outputs, inputs
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of a GPU: processors · lanes · gigahertz are its instructions per second."""

    name: str
    target: str
    processors: int
    lanes: int
    gigahertz: float
    terabytes: float
    teraflops: float
    shared: int = 228 * 1024

    def seconds(
        self, bytes_: float, instructions: float, flops: float, integer: float = 0
    ) -> dict[str, float]:
        """Time at each limit; `integer` counts the instructions that issue at half rate."""
        issue = self.processors * self.lanes * self.gigahertz * 1e9
        return {
            "bandwidth": bytes_ / self.terabytes / 1e12,
            "issue": instructions / issue,
            "integer pipe": integer / (issue / 2),
            "tensor cores": flops / self.teraflops / 1e12,
        }

    def programs(self, compiled: aot_compile.Compiled) -> int:
        """Programs that fit on one multiprocessor."""
        registers = -(-compiled.registers // 8) * 8 * compiled.lanes * compiled.warps
        whole = (131072 if compiled.lanes == 64 else 65536) // max(1, registers)
        return min(whole, self.shared // max(1, compiled.shared), 32)


CHIPS = (
    Chip("A100", "sm_80", 108, 128, 1.41, 2.039, 312, 164 * 1024),
    Chip("H100", "sm_90", 132, 128, 1.755, 3.35, 989),
    Chip("B200", "sm_100", 148, 128, 1.965, 8.0, 2250),
    Chip("MI300X", "gfx942", 304, 64, 2.1, 5.3, 1307, 64 * 1024),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A kernel's cost per weight.

    instructions: thread-instructions for `rows` rows of x.
    rows:         rows of x that one program serves, padding included.
    bits:         bits read from memory.
    integer:      those of the instructions that NVIDIA's integer and logic pipe runs, at half rate.
    """

    instructions: float
    rows: int
    bits: float
    compiled: aot_compile.Compiled
    integer: float = 0


def gemm_cost(layout: Layout, blocks: Blocks, target: str, grouped: bool = False) -> Cost:
    """Main loop and salient loop of the fused product, per weight.

    grouped: of experts, per weight of one of them.

    Raises ValueError if the loops are not found where they are expected.
    """
    form = triton_layout(layout)
    compiled = aot_compile.compile_gemm(layout, blocks, target, grouped=grouped)
    found = [loop for loop in instruction_count.loops(compiled) if len(loop.operations) > 10]
    main = [i for i, loop in enumerate(found) if loop.tensor]
    if len(main) != 1 or len(found) <= main[0] + (form.slots > 0):
        raise ValueError(f"{target}: loops of {[len(x.operations) for x in found]} instructions")
    threads = compiled.lanes * compiled.warps
    weights = {main[0]: blocks.block_n * form.step}  # of a turn of each loop
    if (
        form.slots
    ):  # a round takes SALIENT_CHUNK slots of every row; the loop is unrolled for few rows of x
        rounds = SALIENT_UNROLL if blocks.block_m <= 16 else 1
        weights[main[0] + 1] = blocks.block_n * form.group * SALIENT_CHUNK * rounds // form.slots
    each, integer = (
        sum(threads * count(found[i]) / most for i, most in weights.items())
        for count in (lambda loop: len(loop.operations), integer_operations)
    )
    return Cost(each, blocks.block_m, form.bits_per_weight(4096), compiled, integer)


def integer_operations(loop: instruction_count.Loop) -> int:
    """Instructions of NVIDIA's integer and logic pipe."""
    return sum(count for name, count in loop.counts().items() if name in INTEGER)


def vllm_cost(rows: int, target: str) -> Cost:
    """vLLM's `triton_w4a16_gemm_kernel` with the blocks it chooses on data-centre GPUs."""
    block_m, block_n, block_k = (
        (32, 64, 32) if rows <= 32 else (64, 64, 32) if rows <= 64 else (128, 128, 32)
    )
    compiled = aot_compile.compile_vllm(block_m, block_n, block_k, target)
    (main,) = (loop for loop in instruction_count.loops(compiled) if loop.tensor)
    each = len(main.operations) * compiled.lanes * compiled.warps / (block_n * block_k)
    return Cost(each, block_m, 4 + (16 + 4) / 128, compiled)


def dequantize_cost(layout: Layout, target: str) -> float:
    """Thread-instructions per weight of the whole kernel."""
    compiled = aot_compile.compile_dequantize(layout, target)
    threads = compiled.lanes * compiled.warps
    return instruction_count.all_operations(compiled) * threads / (64 * triton_layout(layout).step)


def gather_cost(layout: Layout, target: str) -> float:
    """Thread-instructions per weight of rows that are looked up, of the whole kernel."""
    compiled = aot_compile.compile_gather(layout, target)
    threads, weights = compiled.lanes * compiled.warps, BLOCK_IDS * triton_layout(layout).step
    return instruction_count.all_operations(compiled) * threads / weights


def expert_lines(chip: Chip, names: list[str], rows: list[int]) -> Iterator[str]:
    """Lines of Markdown: grouped products by rows per expert, and rows of embeddings."""
    yield "| kernel | block | instructions per weight | registers | spilled |"
    yield "|---|---|--:|--:|--:|"
    family = family_of(chip.target)
    for name in names:
        layout = LAYOUTS[name]
        for m in rows:
            blocks = blocks_for(family, m, triton_layout(layout).step)
            if blocks is not None:
                cost = gemm_cost(layout, blocks, chip.target, grouped=True)
                made = cost.compiled
                block = f"{blocks.block_n} × {blocks.block_m}, {blocks.warps} warps"
                yield (
                    f"| experts, {name} | {block} | {cost.instructions:.2f} | {made.registers} | "
                    f"{made.spilled} |"
                )
        made = aot_compile.compile_gather(layout, chip.target)
        yield (
            f"| embeddings, {name} | {BLOCK_IDS} ids | {gather_cost(layout, chip.target):.2f} | "
            f"{made.registers} | {made.spilled} |"
        )
    yield ""


def layer_seconds(chip: Chip, cost: Cost, rows: int) -> tuple[float, str]:
    """Time of one decoder layer's products at M = rows, and its bound."""
    blocks = -(-rows // cost.rows)
    weights = sum(n * k for n, k in SHAPES.values())
    times = chip.seconds(
        weights * cost.bits / 8,
        weights * cost.instructions * blocks,
        2 * weights * cost.rows * blocks,
        weights * cost.integer * blocks,
    )
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def panel_seconds(chip: Chip, layout: Layout, rows: int) -> tuple[float, str]:
    """The same where weights are dequantized to bfloat16 for a plain product."""
    weights = sum(n * k for n, k in SHAPES.values())
    bits = triton_layout(layout).bits_per_weight(4096)
    each = dequantize_cost(layout, chip.target)
    unpack = chip.seconds(weights * (bits / 8 + 2), weights * each, 0)
    multiply = chip.seconds(weights * 2, 0, 2 * weights * rows)
    return max(unpack.values()) + max(multiply.values()), "dequantized"


def report(chips: list[Chip], names: list[str], rows: list[int]) -> Iterator[str]:
    """Lines of Markdown: entries with their costs, then times of a Llama-3-8B layer."""
    for chip in chips:
        yield f"### {chip.name} ({chip.target})"
        yield ""
        yield (
            "| kernel | M | block | bits read | instructions per weight | registers | spilled | "
            "warps per processor | µs per layer | bound by | × bf16's bandwidth |"
        )
        yield "|---|--:|---|--:|--:|--:|--:|--:|--:|---|--:|"
        family = family_of(chip.target)
        weights = sum(n * k for n, k in SHAPES.values())
        plain = {m: max(chip.seconds(2 * weights, 0, 2 * weights * m).values()) for m in rows}
        for name in names:
            for m in rows:
                blocks = blocks_for(family, m, triton_layout(LAYOUTS[name]).step)
                if blocks is None:
                    seconds, bound = panel_seconds(chip, LAYOUTS[name], m)
                    row = f"| {name} | {m} | – | | | | | "
                else:
                    cost = gemm_cost(LAYOUTS[name], blocks, chip.target)
                    seconds, bound = layer_seconds(chip, cost, m)
                    block = f"{blocks.block_n} × {blocks.block_m}, {blocks.warps} warps"
                    row = f"| {name} | {m} | {block} | {_columns(chip, cost)}"
                yield row + f"| {seconds * 1e6:.1f} | {bound} | {plain[m] / seconds:.2f} |"
        for m in rows:
            cost = vllm_cost(m, chip.target)
            seconds, bound = layer_seconds(chip, cost, m)
            yield (
                f"| vLLM triton_w4a16 | {m} | {cost.rows} rows | {_columns(chip, cost)}"
                f"| {seconds * 1e6:.1f} | {bound} | {plain[m] / seconds:.2f} |"
            )
        yield ""
        yield from expert_lines(chip, names, rows)


def _columns(chip: Chip, cost: Cost) -> str:
    made = cost.compiled
    return (
        f"{cost.bits:.2f} | {cost.instructions:.2f} | {made.registers} | {made.spilled} | "
        f"{chip.programs(made) * made.warps} "
    )


OVER = "  <-- over"


def check_all() -> Iterator[str]:
    """Compile every entry of the table for every target; a line for each, ending in OVER if it
    spills or a chip's shared memory is exceeded. sm_75, which is not served, may spill.
    """
    for target in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"):
        limit = (
            65536 if target.startswith("gfx94") else 160 * 1024 if "gfx" in target else 99 * 1024
        )
        family = family_of(target)
        for most in TABLE[family]:
            for name, layout in LAYOUTS.items():
                blocks = blocks_for(family, most, triton_layout(layout).step)
                assert blocks is not None
                for grouped in (False, True):
                    kind = f"{target} {name} {blocks.block_n}x{blocks.block_m}"
                    kind += " of experts" * grouped
                    try:
                        made = aot_compile.compile_gemm(layout, blocks, target, grouped=grouped)
                    except RuntimeError as error:
                        text = str(error).splitlines()
                        yield f"{kind}: {text[0] if text else error!r}"
                        continue
                    spills = made.spilled > 0 and target != "sm_75"
                    fault = OVER if spills or made.shared > limit else ""
                    yield (
                        f"{kind}: {made.registers} registers, {made.spilled} bytes spilled "
                        f"({instruction_count.spills(made)} instructions in loops), "
                        f"{made.shared} shared{fault}"
                    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=[chip.name for chip in CHIPS])
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--check", action="store_true", help="compile every entry for every chip")
    options = parser.parse_args()
    if options.check:
        lines = check_all()
    else:
        chips = [chip for chip in CHIPS if options.chip is None or chip.name in options.chip]
        lines = report(chips, options.layout or list(LAYOUTS), options.rows)
    faults = 0
    for line in lines:
        print(line, flush=True)
        faults += line.endswith(OVER)
    if faults:
        parser.exit(1, f"{faults} entries spill or take more shared memory than they may\n")


if __name__ == "__main__":
    main()
