"""Times of grouped products and of embeddings beside torch's, for `acceptance.py`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
from cost_model import LAYOUTS
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.routes import Grouping, sorted_routes
from precalib_kernels.backends.triton import gather_op, grouped_op
from precalib_kernels.backends.triton.repack import repack


@dataclasses.dataclass(frozen=True)
class Shape:
    """One matrix of a layer's experts: their number, how many a token has, outputs, inputs."""

    experts: int
    chosen: int
    outputs: int
    inputs: int


EXPERTS = {  # gate and up together, of one GPU
    "Qwen3-30B-A3B gate_up": Shape(128, 8, 1536, 2048),
    "Mixtral-8x7B down": Shape(8, 2, 4096, 14336),
}
EMBEDDINGS = {"Llama-3-8B": (128256, 4096)}
TOKENS = (1, 4, 16, 64, 256, 1024)
IDS = (1, 16, 256, 4096)


def packed_experts(name: str, shape: Shape, device: str = "cuda") -> list[Tensor]:
    """The stacked arrays of experts that are alike, each with memory of its own."""
    layout = LAYOUTS[name]
    one = measure.random_packed(layout, shape.outputs, shape.inputs)
    arrays = repack(
        {k: t.to(device) for k, t in one.items()}, layout, shape.inputs, [shape.outputs]
    )
    order = ops.array_order(layout)
    return [arrays[k].expand(shape.experts, *arrays[k].shape).contiguous() for k in order]


def routed(shape: Shape, tokens: int, device: str = "cuda") -> Grouping:
    """Tokens that choose experts at random, none of them twice."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, shape.experts, generator=generator).argsort(1)[:, : shape.chosen]
    block = grouped_op.route_block(-(-ids.numel() // shape.experts))
    routes = sorted_routes(ids.to(device), shape.experts, block)
    factors = torch.rand(ids.numel(), generator=generator).to(device)
    return Grouping(routes, shape.chosen, factors)


def plain_grouped(x: Tensor, weight: Tensor, chosen: int) -> Callable[[], Tensor]:
    """torch's grouped product in bfloat16 of as many rows, as many for each expert."""
    experts = weight.shape[0]
    rows = x.repeat_interleave(chosen, 0)
    ends = torch.arange(1, experts + 1, device=x.device) * len(rows) // experts
    return functools.partial(
        torch.nn.functional.grouped_mm, rows, weight.transpose(1, 2), offs=ends.int()
    )


def expert_times(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row per matrix and number of tokens: microseconds, and ratios to torch's bfloat16."""
    for title, shape in EXPERTS.items():
        sizes = shape.experts, shape.outputs, shape.inputs
        dense = torch.randn(sizes, dtype=torch.bfloat16, device="cuda")
        packed = {name: packed_experts(name, shape) for name in names}
        for tokens in TOKENS:
            x = torch.randn(tokens, shape.inputs, dtype=torch.bfloat16, device="cuda")
            grouping = routed(shape, tokens)
            calls: dict[str, list[Callable[[], Any]]] = {}
            plain = plain_grouped(x, dense, shape.chosen)
            try:
                plain()
                calls["bf16"] = [plain]
            except (RuntimeError, AttributeError) as error:
                print(f"torch's grouped product is left out: {str(error)[:100]}", flush=True)
            for name in names:
                weight = packed[name], None, grouping, [shape.outputs], LAYOUTS[name].to_text()
                calls[name] = [functools.partial(grouped_op.gpu_grouped_linear, x, *weight)]
            yield {"case": title, "rows": tokens} | _row(calls, rounds)
        del dense, packed
        torch.cuda.empty_cache()


def embedding_times(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row per table and number of ids."""
    for title, (rows, columns) in EMBEDDINGS.items():
        dense = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        packed = {name: measure.packed_arrays(LAYOUTS[name], rows, columns) for name in names}
        for count in IDS:
            ids = torch.randint(0, rows, (count,), device="cuda")
            calls: dict[str, list[Callable[[], Any]]] = {
                "bf16": [functools.partial(torch.nn.functional.embedding, ids, dense)]
            }
            for name in names:
                table = packed[name], columns, rows, LAYOUTS[name].to_text(), torch.bfloat16
                calls[name] = [functools.partial(gather_op.gpu_gather_rows, ids, *table)]
            yield {"case": f"{title} embeddings", "rows": count} | _row(calls, rounds)


def _row(calls: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, Any]:
    times = measure.interleaved(calls, rounds)
    ratios = {n: round(times.ratio(n, "bf16"), 4) for n in calls if "bf16" in calls and n != "bf16"}
    return {"microseconds": {n: round(1e3 * times.median(n), 2) for n in calls}, "ratio": ratios}


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of such rows, in microseconds."""
    names = list(dict.fromkeys(name for row in rows for name in row["microseconds"]))
    yield "| experts or embeddings | tokens | " + " | ".join(f"{n}, µs" for n in names) + " |"
    yield "|--|--:|" + "--:|" * len(names)
    for row in rows:
        cells = (f"{row['microseconds'][n]:.1f}" if n in row["microseconds"] else "" for n in names)
        yield f"| {row['case']} | {row['rows']} | " + " | ".join(cells) + " |"
