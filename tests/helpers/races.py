"""The x86 kernels under ThreadSanitizer, called by several threads at once.

    python tests/helpers/races.py [ISA …]

For all ISAs of the machine, or those named; tiles of AMX are emulated where there are none. Python
and torch stay out of the process: call_products.cpp computes problems that are written to a file.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from packed_tensors import random_packed
from sanitized_objects import DEBUG, THREAD, compile_units
from torch import Tensor
from x86_cases import LAYOUTS

from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.backends.x86.repack import repack
from precalib_kernels.toolchain.compile import find_compiler

HERE = Path(__file__).parent
TILES = HERE.parent / "kernels" / "backends" / "x86" / "software_tiles.h"
FLAGS = (*THREAD, *DEBUG)
CALLERS, ROUNDS = 3, 2
COLUMNS, SHARDS = 1024, (520, 40)  # enough work for several threads at M = 1
BATCH_SIZES = (1, 4, 6, 12, 20, 70)
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of `Type` in kernel_table.h
NAMES = ("balanced-4", "rtn-4", "signs")
WITHOUT_BARRIERS = "-DWITHOUT_BARRIERS"


def isas(names: Iterable[str] = ()) -> list[library.X86Isa]:
    """Those of the machine, of `names` if there are any, ascending."""
    machine = library.supported_isas()
    wanted = set(names) or {*machine, *(["amx"] if machine[-1:] == ("avx512_bf16",) else [])}
    found = [isa for isa in library.ISAS if isa.name in wanted]
    if "amx" in machine or "amx" not in wanted:
        return found
    flags = (*library.AVX512_BF16.flags, "-include", str(TILES))
    return [*found[:-1], dataclasses.replace(library.AMX, flags=flags)]


def build(chosen: Sequence[library.X86Isa], work: Path, *flags: str) -> Path:
    """The program with the kernels of these ISAs."""
    compiler = find_compiler()
    assert compiler
    emulated = any(str(TILES) in isa.flags for isa in chosen)
    common = (*FLAGS, *(["-DPRECALIB_SOFTWARE_TILES"] if emulated else []))
    options = library.BuildOptions(tuple(chosen), common)
    units = [u for u in library.definition(options).units if u.source.name != "torch_binding.cpp"]
    program = work / ("call_products" + "".join(flags))
    own = [compiler, "-std=c++20", *FLAGS, *flags, HERE / "call_products.cpp"]
    objects = compile_units(compiler, units)
    subprocess.run([*own, *objects, "-pthread", "-o", program], check=True)
    return program


def write_problems(
    file: Path, chosen: Sequence[library.X86Isa], names: Sequence[str] = NAMES
) -> None:
    """Products by these ISAs with every kernel of layouts, and rows by number."""
    generator = torch.Generator().manual_seed(5)
    with file.open("wb") as out:
        for name, rounded, number in itertools.product(names, (False, True), range(len(chosen))):
            nibbles = library.takes_nibbles(chosen[number].name)
            layout = X86Layout(LAYOUTS[name], COLUMNS, SHARDS, rounded, nibbles)
            out.writelines(_problems(layout, number, generator))


def _problems(layout: X86Layout, isa: int, generator: torch.Generator) -> Iterator[bytes]:
    made = [random_packed(layout.layout, rows, COLUMNS, rows).tensors for rows in SHARDS]
    packed = repack({key: torch.cat([one[key] for one in made]) for key in made[0]}, layout, "here")
    for m, dtype in itertools.product(BATCH_SIZES, TYPES):
        x = torch.randn((m, COLUMNS), generator=generator).to(dtype)
        y = m * sum(SHARDS) * dtype.itemsize
        bias = torch.randn(sum(SHARDS), generator=generator).to(dtype)
        yield _problem(m, dtype, isa, layout, packed, x, bias, y)
    ids = torch.randint(sum(SHARDS), (9,), generator=generator)
    y = len(ids) * COLUMNS * torch.bfloat16.itemsize
    yield _problem(len(ids), torch.bfloat16, -1, layout, packed, ids, None, y)


def _problem(
    rows: int,
    dtype: torch.dtype,
    isa: int,
    layout: X86Layout,
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    result: int,
) -> bytes:
    parts = [layout.to_bytes(), _bytes(packed), _bytes(x), b"" if bias is None else _bytes(bias)]
    head = torch.tensor([rows, TYPES.index(dtype), isa, *map(len, parts), result])
    return head.numpy().tobytes() + b"".join(parts)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def run(program: Path, problems: Path) -> subprocess.CompletedProcess[str]:
    """Call the kernels; the code is 66 if there was a race.

    Addresses are not randomized: GCC's ThreadSanitizer does not start with much of that.
    """
    fixed = [path, "-R"] if (path := shutil.which("setarch")) else []
    return subprocess.run(
        [*fixed, program, problems, str(CALLERS), str(ROUNDS)],
        capture_output=True,
        text=True,
        env=os.environ | {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1"},
    )


def main() -> None:
    chosen = isas(sys.argv[1:])
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"races: compiling for {', '.join(isa.name for isa in chosen)}", flush=True)
        program = build(chosen, work)
        write_problems(work / "problems", chosen)
        done = run(program, work / "problems")
    print(f"races: {done.stdout.strip()}\n{done.stderr[-8000:]}".rstrip(), flush=True)
    sys.exit(1 if done.returncode else 0)


if __name__ == "__main__":
    main()
