"""Kernels compiled ahead of time for any chip, on any machine: for tests and the static model."""

import ast
import dataclasses
import importlib.util
import linecache
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from precalib_kernels.backends.triton.activation_kernel import prepare_kernel
from precalib_kernels.backends.triton.dequantize_kernel import dequantize_kernel
from precalib_kernels.backends.triton.gather_kernel import gather_kernel
from precalib_kernels.backends.triton.gather_op import BLOCK_IDS, GATHER_OPTIONS
from precalib_kernels.backends.triton.gemm_kernel import gemm_kernel
from precalib_kernels.backends.triton.kernel_arguments import prepare_blocks
from precalib_kernels.backends.triton.launch_configs import Blocks, SparseBlocks
from precalib_kernels.backends.triton.memory_layout import triton_layout
from precalib_kernels.backends.triton.op import (
    DEQUANTIZE_WARPS,
    PREPARE_WARPS,
    specialization,
)
from precalib_kernels.backends.triton.salient_kernel import sparse_kernel
from precalib_kernels.backends.triton.salient_op import specialization as sparse_specialization
from precalib_kernels.format.layout import Layout

POINTERS = {
    "x": "bf16", "y": "bf16", "out": "bf16", "bias": "bf16", "weight": "bf16",
    "column_scale": "fp16", "words": "i16", "group_data": "i32", "positions": "u8",
    "values": "fp16", "affine": "fp16", "row_unit": "fp32", "salient_unit": "fp32", "table": "u8",
    "constants": "i16", "tiles": "i32", "dots": "fp16", "by_column": "fp16", "offset_terms": "fp32",
    "group_sums": "fp32", "x_scale": "fp32", "partial_sums": "fp32", "counters": "i32",
    "routes": "i32", "expert_ids": "i32", "used": "i32", "factors": "fp32", "ids": "i64",
}  # fmt: skip
VLLM_KERNEL = "model_executor/kernels/linear/mixed_precision/triton_w4a16.py"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a kernel.

    target:    "sm_90" or "gfx942".
    code:      its instructions as text: SASS, or AMD's assembly.
    registers: vector registers of a thread.
    spilled:   bytes of local memory of a thread.
    shared:    bytes of shared memory of a program.
    warps:     of a program.
    """

    target: str
    code: str
    registers: int
    spilled: int
    shared: int
    warps: int

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.target.startswith("gfx9") else 32


def compile_gemm(
    layout: Layout, blocks: Blocks, target: str, split: bool = True, grouped: bool = False
) -> Compiled:
    """`gemm_kernel` as the operator would launch it, in bfloat16 without bias.

    grouped: for a mixture of experts, the second of its products, which weighs results.
    """
    constants = specialization(triton_layout(layout), target.startswith("sm_")) | {
        "BIAS": False,
        "SPLIT": split,
        "BLOCK_N": blocks.block_n,
        "BLOCK_M": blocks.block_m,
        "STAGES": blocks.stages,
        "GROUPED": grouped,
        "WEIGHTED": grouped,
    }
    return compile_kernel(gemm_kernel, constants, target, blocks.options)


def compile_dequantize(layout: Layout, target: str) -> Compiled:
    """`dequantize_kernel` to bfloat16."""
    form = triton_layout(layout)
    constants = specialization(form, target.startswith("sm_")) | {
        "SCALED": layout.column_scale,
        "ENTRIES_PER_UNIT": form.entries_per_unit,
        "IN_DOTS": form.mode == "trellis",
    }
    return compile_kernel(
        dequantize_kernel, constants, target, {"num_warps": DEQUANTIZE_WARPS, "num_stages": 3}
    )


def compile_gather(layout: Layout, target: str) -> Compiled:
    """`gather_kernel` to bfloat16."""
    form = triton_layout(layout)
    constants = specialization(form, target.startswith("sm_")) | {
        "SCALED": layout.column_scale,
        "ENTRIES_PER_UNIT": form.entries_per_unit,
        "BLOCK": BLOCK_IDS,
    }
    return compile_kernel(gather_kernel, constants, target, GATHER_OPTIONS)


def compile_prepare(
    layout: Layout, block_m: int, columns: int, target: str, grouped: bool = False
) -> Compiled:
    """`prepare_kernel` for rows of so many bfloat16 columns."""
    block_k, row_block = prepare_blocks(block_m, columns)
    form = triton_layout(layout)
    constants = {
        "OFFSET": form.offset,
        "ENTRIES_PER_UNIT": form.entries_per_unit,
        "GROUP": form.group,
        "MODE": form.mode,
        "J": form.chain_tiles,
        "SCALED": layout.column_scale,
        "BY_COLUMN": form.slots > 0,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "ROW_BLOCK": row_block,
        "GROUPED": grouped,
    }
    options = {"num_warps": PREPARE_WARPS, "num_stages": 3}
    return compile_kernel(prepare_kernel, constants, target, options)


def compile_sparse(layout: Layout, blocks: SparseBlocks, target: str) -> Compiled:
    """`sparse_kernel` as the operator would launch it, in bfloat16 with bias."""
    constants = sparse_specialization(blocks, True) | {
        "GROUP": layout.group_size,
        "COUNT": layout.salient_count,
    }
    options = {"num_warps": blocks.warps, "num_stages": 3}
    return compile_kernel(sparse_kernel, constants, target, options)


def compile_vllm(block_m: int, block_n: int, block_k: int, target: str) -> Compiled:
    """vLLM's `triton_w4a16_gemm_kernel`, 4 bits with zero points, bfloat16.

    Raises ModuleNotFoundError where vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vLLM is not installed")
    path = Path(spec.submodule_search_locations[0]) / VLLM_KERNEL
    kernel = kernel_from(path, "triton_w4a16_gemm_kernel")
    constants = {
        "HAS_ZP": True, "ZP_BIAS": 8, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    types = {"a_ptr": "*bf16", "c_ptr": "*bf16", "scales_ptr": "*bf16"}
    types |= {"b_ptr": "*i32", "zeros_ptr": "*i32"}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in types or name in ("N", "K", "stride_am", "stride_bk", "stride_cm"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    # strides of 1 are constants to Triton, as they would be when it is launched
    ones = {"stride_ak": 1, "stride_bn": 1, "stride_cn": 1}
    signature |= dict.fromkeys(ones, "constexpr")
    source = ASTSource(kernel, signature, constants | ones, aligned)
    return _built(source, target, {"num_warps": 4, "num_stages": 3})


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    target: str,
    options: dict[str, int],
    pointers: Mapping[str, str] = POINTERS,
) -> Compiled:
    """A kernel whose pointers have these types, aligned; other arguments are 32-bit integers."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return _built(ASTSource(kernel, signature, constants, aligned), target, options)


def _built(source: ASTSource, target: str, options: dict[str, int]) -> Compiled:
    warps = options["num_warps"]
    if target.startswith("gfx"):
        made = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        text = made.asm["amdgcn"]
        registers, spilled, shared = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])
            for key in ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        )
        return Compiled(target, text, registers, spilled, max(shared, made.metadata.shared), warps)
    made = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )
    registers, spilled = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    return Compiled(target, code, registers, spilled, made.metadata.shared, warps)


def _cuobjdump() -> str:
    """NVIDIA's disassembler, which Triton's wheel brings along."""
    ours = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(ours) if ours.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor on the path")
    return found


def kernel_from(path: Path, name: str) -> Any:
    """A kernel of another package's file, without importing that package."""
    text = path.read_text()
    function = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    first = min(node.lineno for node in function.decorator_list)
    body = "\n".join(text.splitlines()[first - 1 : function.end_lineno])
    source = f"import triton\nimport triton.language as tl\n{body}\n"
    where = f"<{name}>"  # Triton reads a kernel's text back through linecache
    linecache.cache[where] = (len(source), None, source.splitlines(True), where)
    module: dict[str, Any] = {"__name__": name}
    exec(compile(source, where, "exec"), module)
    return module[name]
