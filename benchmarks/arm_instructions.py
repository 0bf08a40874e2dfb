"""Instructions per weight of the Arm kernels, and of ggml's, counted without an Arm processor.

    python benchmarks/arm_instructions.py [--ggml FOLDER] [--out FILE]

Two counts, for M = 1, 4 and 16, over weights times rows of x:

- inner loops: read off the disassembled object. A loop is the code between a backward branch and
  its target; its work follows from its SDOT (16 products each), SMMLA (32) and TBL (16 weights).
- executed: by all of a product, scales and salient weights included, in qemu. Products with 16 and
  32 rows of weights are run one instruction at a time and their difference is taken, so that what
  is done once per call does not count.

It needs Debian's g++-aarch64-linux-gnu and qemu-user-static. FOLDER is `ggml` of llama.cpp's
sources; the sdist of llama-cpp-python has it as vendor/llama.cpp/ggml. Without it ggml is left out.
"""

import argparse
import collections
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.memory_layout import ArmLayout
from precalib_kernels.format.layout import Layout

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DRIVER = Path(__file__).with_suffix(".cpp")
BATCH_SIZES = (1, 4, 16)
COLUMNS, ROWS = 4096, (16, 32)
GEMV_ROWS = 4  # from M = 5 on the GEMM
BFLOAT16 = 1  # `Type` of kernel_table.h
LAYOUTS = {
    **{name: RECIPES[name].layout for name in RECIPES if name.startswith("balanced")},
    "4 bits, g 64, 3 salient": dataclasses.replace(
        RECIPES["balanced-4"].layout, group_size=64, salient_count=3
    ),
    "rtn-4": RECIPES["rtn-4"].layout,
}
# Of ggml: name in the table, what arm_instructions.cpp calls it, loops of M = 1, 4 and 16.
GGML = {
    "dotprod": (
        ("q4_K, vec_dot", "q4_K", ("vec_dot_q4_K_q8_K",) * 3),
        ("q4_0, repacked 4x4", "q4_0_4x4", ("gemv_q4_0_4x4", "gemm_q4_0_4x4", "gemm_q4_0_4x4")),
        ("q4_K, repacked 8x4", "q4_K_8x4", ("gemv_q4_K_8x4", "gemm_q4_K_8x4", "gemm_q4_K_8x4")),
    ),
    "i8mm": (
        ("q4_K, vec_dot", "q4_K", ("vec_dot_q4_K_q8_K",) * 3),
        ("q4_0, repacked 4x8", "q4_0_4x8", ("gemv_q4_0_4x8", "gemm_q4_0_4x8", "gemm_q4_0_4x8")),
        ("q4_K, repacked 8x8", "q4_K_8x8", ("gemv_q4_K_8x8", "gemm_q4_K_8x8", "gemm_q4_K_8x8")),
    ),
}
GGML_SOURCES = ("src/ggml-cpu/arch/arm/quants.c", "src/ggml-cpu/arch/arm/repack.cpp")


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop: the function it is in, and how often each instruction stands in it."""

    function: str
    counts: collections.Counter[str]

    @property
    def instructions(self) -> int:
        return self.counts.total()

    @property
    def products(self) -> int:
        """Weights times virtual rows of x."""
        return 16 * self.counts["sdot"] + 32 * self.counts["smmla"]


def loops(objects: str) -> list[Loop]:
    """All innermost loops of disassembled code."""
    found = []
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:[ \t].*\n)*)", objects, re.M):
        code = re.findall(r"^\s*([0-9a-f]+):\t(\S+)[ \t]*(.*)$", body, re.M)
        place = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
        spans = []
        for i, (_, operation, arguments) in enumerate(code):
            target = re.search(r"\b([0-9a-f]+) <", arguments)
            jump = re.fullmatch(r"b|b\..*|cbn?z|tbn?z", operation)
            if jump and target and place.get(int(target[1], 16), i + 1) <= i:
                spans.append((place[int(target[1], 16)], i))
        for first, last in spans:
            inside = any(first <= a and b <= last for a, b in spans if (a, b) != (first, last))
            if not inside:
                operations = (operation for _, operation, _ in code[first : last + 1])
                found.append(Loop(name, collections.Counter(operations)))
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


class Build:
    """The program and the objects of one ISA."""

    def __init__(self, isa: library.ArmIsa, ggml: Path | None, work: Path) -> None:
        self.isa, self.work = isa, work / isa.name
        self.work.mkdir()
        objects = []
        for unit in library.sources((isa,)).units:
            if unit.source.name != "torch_binding.cpp":
                objects.append(self._compile(unit.source, unit.flags))
        self.kernels = self._disassemble(objects[-1])
        flags = ["-O3", *isa.flags]
        self.peers: list[Loop] = []
        if ggml:
            includes = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
            for source in GGML_SOURCES:
                objects.append(self._compile(ggml / source, (*flags, *includes)))
                self.peers += self._disassemble(objects[-1])
        driver = [*flags, "-std=c++20", f"-DPRECALIB_DOT_ROWS={2 if isa == library.I8MM else 1}"]
        driver += ["-DWITH_GGML"] if ggml else []
        self.program = self.work / "program"
        others: list[str | Path] = ["-static", "-fopenmp", DRIVER, *objects, "-o", self.program]
        run(COMPILER, *driver, *others)

    def _compile(self, source: Path, flags: tuple[str, ...]) -> Path:
        made = self.work / f"{source.stem}.o"
        compiler = COMPILER.replace("g++", "gcc") if source.suffix == ".c" else COMPILER
        run(compiler, *flags, "-c", source, "-o", made)
        return made

    def _disassemble(self, path: Path) -> list[Loop]:
        tool = COMPILER.replace("g++", "objdump")
        return loops(run(tool, "-d", "-C", "--no-show-raw-insn", path))

    def executed(
        self, kernel: str, m: int, layout: Layout | None = None, int8: bool = False
    ) -> float:
        """Instructions per weight and row of x, over all of a product."""
        counts = [self._trace(kernel, rows, m, layout, int8) for rows in ROWS]
        return (counts[1] - counts[0]) / ((ROWS[1] - ROWS[0]) * COLUMNS * m)

    def _trace(self, kernel: str, rows: int, m: int, layout: Layout | None, int8: bool) -> int:
        words = [kernel, str(rows), str(COLUMNS), str(m)]
        if layout:
            file = self.work / "layout"
            file.write_bytes(ArmLayout(layout, COLUMNS, (rows,), int8).to_bytes())
            words += [str(file), str(BFLOAT16), str(library.ISAS.index(self.isa))]
        log = self.work / "log"
        trace = ("-singlestep", "-d", "nochain,exec", "-D", str(log))
        run(EMULATOR, "-cpu", "max", *trace, "-E", "OMP_NUM_THREADS=1", self.program, *words)
        with log.open("rb") as lines:
            return sum(line.startswith(b"Trace") for line in lines)

    def inner_loops(self, layout: Layout, m: int, splits: int = 2) -> float:
        """Instructions of the inner loops per weight and row of x, for bfloat16 x."""
        trellis = "true" if layout.trellis else "false"
        if m <= GEMV_ROWS:
            name = f"gemv_(block|int8)<{layout.bits}, {trellis}, {splits}, {m}>"
            loop = max(_named(self.kernels, name), key=lambda loop: loop.products)
            return loop.instructions * splits / loop.products
        found = _named(self.kernels, f"gemm_(block|int8)<{layout.bits}, {trellis}, {splits}>")
        decode = max(found, key=lambda loop: loop.counts["tbl"])
        multiply = max(found, key=lambda loop: loop.products)
        per_row = multiply.instructions * splits / multiply.products
        return decode.instructions / (16 * decode.counts["tbl"]) / m + per_row


def _named(found: list[Loop], pattern: str) -> list[Loop]:
    return [loop for loop in found if re.search(pattern, loop.function)]


def table(build: Build, ggml: bool) -> Iterator[str]:
    """Rows of Markdown: per weight and row of x, inner loops and executed."""
    yield "| kernel | activations | M = 1 | 4 | 16 |"
    yield "|---|--:|--:|--:|--:|"
    for name, layout in LAYOUTS.items():
        for splits in (2, 1) if name == "balanced-4" else (2,):
            cells = []
            for m in BATCH_SIZES:
                executed = build.executed("precalib", m, layout, splits == 1)
                cells.append(f"{build.inner_loops(layout, m, splits):.3f} / {executed:.3f}")
            yield f"| `{name}` | {8 * splits} bits | {' | '.join(cells)} |"
    for name, kernel, functions in GGML[build.isa.name] if ggml else ():
        cells = []
        for m, function in zip(BATCH_SIZES, functions, strict=True):
            found = _named(build.peers, f"^ggml_{function}")
            loop = max(found, key=lambda loop: loop.products, default=None)
            inner = f"{loop.instructions / loop.products:.3f}" if loop and loop.products else "–"
            cells.append(f"{inner} / {build.executed(kernel, m):.3f}")
        yield f"| ggml {name} | 8 bits | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", type=Path, help="folder of ggml's sources")
    parser.add_argument("--out", type=Path, help="file for the tables, besides the screen")
    options = parser.parse_args()
    for tool in (COMPILER, EMULATOR):
        if not shutil.which(tool):
            sys.exit(
                f"{tool} is not on the PATH: apt-get install g++-aarch64-linux-gnu qemu-user-static"
            )
    if options.ggml is None:
        print("ggml is left out: --ggml names no folder of its sources", file=sys.stderr)
    lines = [f"Compiler: {run(COMPILER, '--version').splitlines()[0]}", ""]
    with tempfile.TemporaryDirectory() as work:
        for isa in library.ISAS:
            build = Build(isa, options.ggml, Path(work))
            lines += [f"### ISA `{isa.name}`", "", *table(build, options.ggml is not None), ""]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + os.linesep)


if __name__ == "__main__":
    main()
