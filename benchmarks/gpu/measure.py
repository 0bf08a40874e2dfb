"""Times of GPU calls: CUDA graphs, weights that are not in the cache, interleaved rounds."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aot_compile
import torch
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.triton.repack import repack
from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient

CALLS = 20  # of one candidate in a graph
PATTERN_ROWS = 64  # random rows of a weight, which is then repeated
CACHE_TURNS = 3  # copies of a weight together hold this many times the second-level cache


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call, round by round, of every candidate."""

    rounds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median of the ratios to another candidate in the same round."""
        pairs = zip(self.rounds[name], self.rounds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)


def random_packed(layout: Layout, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Packed tensors [rows, columns] on the CPU: random codes, every salient slot used.

    PATTERN_ROWS rows are random and repeat.
    """
    generator = torch.Generator().manual_seed(seed)
    few = min(PATTERN_ROWS, rows)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in layout.tensors(few, columns).items():
        if dtype == torch.uint8:
            high = 2**layout.bits if name == "zeros" else 256
            tensors[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
        else:
            tensors[name] = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(dtype)
    codes = torch.randint(0, 2**layout.bits, (few, columns), generator=generator)
    tensors["qweight"] = pack_bits(codes.to(torch.uint8), layout.bits)
    if layout.salient_count:
        groups, size, count = layout.groups(columns), layout.group_size, layout.salient_count
        score = torch.rand((few, groups, size), generator=generator)
        score[:, torch.arange(groups * size).view(groups, size) >= columns] = 2
        positions = score.argsort(-1)[..., :count].sort(-1).values.short()
        high = 2 ** (layout.salient_bits - layout.bits)
        codes = torch.randint(0, high, positions.shape, generator=generator).to(torch.uint8)
        tensors["salient"] = pack_salient(positions, codes, layout)
    copies = -(-rows // few)
    return {
        name: t if name == "column_scale" else t.repeat(copies, *[1] * (t.ndim - 1))[:rows]
        for name, t in tensors.items()
    }


def packed_arrays(layout: Layout, rows: int, columns: int, seed: int = 0) -> list[Tensor]:
    """The in-memory form of a random weight on the GPU, in the operators' order."""
    tensors = {k: t.cuda() for k, t in random_packed(layout, rows, columns, seed).items()}
    arrays = repack(tensors, layout, columns, [rows])
    return [arrays[name] for name in ops.array_order(layout)]


def cold_copies(arrays: Sequence[Tensor]) -> list[list[Tensor]]:
    """So many copies that a round over them finds none in the second-level cache."""
    size = sum(array.nbytes for array in arrays)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(CALLS, max(1, -(-CACHE_TURNS * cache // size)))
    return [list(arrays), *([array.clone() for array in arrays] for _ in range(count - 1))]


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """CALLS calls, taken in turn, as one CUDA graph."""
    for _ in range(3):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    return graph.replay


def interleaved(candidates: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> Times:
    """Milliseconds of one call of each candidate, in rounds that take them in turn."""
    graphs = {name: captured(calls) for name, calls in candidates.items()}
    for replay in graphs.values():
        replay()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        order = list(graphs.items())
        for name, replay in order[turn % len(order) :] + order[: turn % len(order)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return Times({name: tuple(each) for name, each in times.items()})


def int4_calls(x: Tensor, rows: int, columns: int) -> list[Callable[[], Any]]:
    """torch's own 4-bit product in groups of 128, without salient weights."""
    words = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device="cuda")
    packed = torch._convert_weight_to_int4pack(words, 8)
    return [
        functools.partial(torch._weight_int4pack_mm, x, w, 128, s)
        for w, s in cold_copies([packed, scales])
    ]


def vllm_calls(path: Path, x: Tensor, rows: int, columns: int) -> list[Callable[[], Any]]:
    """vLLM's Triton W4A16 product in groups of 128, with the blocks it chooses on NVIDIA cards."""
    kernel = aot_compile.kernel_from(path, "triton_w4a16_gemm_kernel")
    m = x.shape[0]
    blocks = (32, 64, 32) if m <= 32 else (64, 64, 32) if m <= 64 else (128, 128, 32)
    block_m, block_n, block_k = blocks
    y = torch.empty(m, rows, dtype=x.dtype, device="cuda")
    grid = -(-m // block_m), -(-rows // block_n)
    limits = -(2**31), 2**31 - 1
    words = torch.randint(*limits, (columns, rows // 8), dtype=torch.int32, device="cuda")
    scales = torch.rand(columns // 128, rows, dtype=x.dtype, device="cuda")

    def call(words: Tensor, scales: Tensor) -> None:
        kernel[grid](
            x, words, scales, words, y, m, rows, columns, *x.stride(), *words.stride(), *y.stride(),
            group_size=128, HAS_ZP=False, ZP_BIAS=8, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_K=block_k,
        )  # fmt: skip

    return [functools.partial(call, *copy) for copy in cold_copies([words, scales])]
