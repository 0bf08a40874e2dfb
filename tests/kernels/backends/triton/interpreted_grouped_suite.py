"""Products of mixtures of experts, run by `test_numerics.py` as `interpreted_suite.py` is."""

import dataclasses

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS
from torch import Tensor
from triton_cases import DEVICE, EPS, Case, inline_bound, layout, make_case, product_bound

from precalib_kernels.backends.routes import Grouping, Routes, sorted_routes
from precalib_kernels.backends.triton import grouped_op, op
from precalib_kernels.backends.triton.launch_configs import TABLE
from precalib_kernels.backends.triton.memory_layout import triton_layout
from precalib_kernels.format.layout import Layout

BLOCKS = sorted({blocks.block_m for blocks in TABLE[op.family()].values()})


@dataclasses.dataclass
class Mixture:
    """Weights of some experts, which all have the layout and shape of the first."""

    experts: list[Case]

    @property
    def packed(self) -> list[Tensor]:
        packed = [expert.packed for expert in self.experts]
        return [torch.stack(arrays) for arrays in zip(*packed, strict=True)]


def mixture(chosen: Layout, parts: list[int], columns: int, experts: int) -> Mixture:
    return Mixture([make_case(chosen, parts, columns, seed=e) for e in range(experts)])


def random_routes(tokens: int, chosen: int, experts: int) -> Tensor:
    """Choices of tokens among all experts but the last, which nobody chooses."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, max(1, experts - 1), (tokens, chosen), generator=generator)


def check(
    weights: Mixture,
    ids: Tensor,
    block: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    weighted: bool = False,
    routes: Routes | None = None,
) -> None:
    """A grouped product, route by route; negative ids are experts of other ranks."""
    first = weights.experts[0]
    generator = torch.Generator().manual_seed(ids.numel())
    tokens, chosen = ids.shape
    x = torch.randn((tokens, first.columns), generator=generator).to(dtype)
    shape = len(weights.experts), sum(first.parts)
    shift = torch.randn(shape, generator=generator).to(dtype) if bias else None
    factors = torch.rand(ids.numel(), generator=generator) if weighted else None
    if routes is None:
        routes = sorted_routes(ids.to(DEVICE), len(weights.experts), block)
    grouping = Grouping(
        routes, chosen, None if factors is None else factors.to(DEVICE), bool((ids >= 0).all())
    )
    text = first.layout.to_text()
    there = None if shift is None else shift.to(DEVICE)
    y = grouped_op.gpu_grouped_linear(
        x.to(DEVICE), weights.packed, there, grouping, first.parts, text
    ).cpu()
    assert y.dtype == dtype
    assert y.shape == (ids.numel(), sum(first.parts))
    flat, rows = ids.flatten(), x.repeat_interleave(chosen, 0)
    assert not y[flat < 0].any()
    for expert, case in enumerate(weights.experts):
        mine = flat == expert
        inputs = rows[mine]
        exact = inputs.double() @ case.weight().T
        if shift is not None:
            exact += shift[expert].double()
        if triton_layout(case.layout).inline_salient:
            allowed = inline_bound(case, inputs) + EPS[dtype] * exact.abs()
        else:
            allowed = product_bound(case, inputs, exact)
        if factors is not None:
            exact, allowed = (t * factors[mine, None].double() for t in (exact, allowed))
        assert ((y[mine].double() - exact).abs() <= allowed + 1e-12).all()


FORMS = [
    pytest.param(layout(2, "uniform", 64, 0), id="2-uniform"),
    pytest.param(layout(3, "trellis", 128, 2), id="3-trellis"),
    pytest.param(layout(4, "table", 32, 1), id="4-table"),
    pytest.param(layout(5, "trellis", 64, 3), id="5-trellis"),
    pytest.param(RECIPE_LAYOUTS["balanced-4"], id="balanced-4"),
    pytest.param(RECIPE_LAYOUTS["paper-3"], id="in-place"),
]


@pytest.mark.parametrize("chosen", FORMS)
def test_every_route_is_the_product_of_its_expert(chosen):
    """Ragged in N and K, fused parts, two of four experts per token, one that nobody chooses."""
    weights = mixture(chosen, [17, 1], 160, 4)
    check(weights, random_routes(5, 2, 4), BLOCKS[0], weighted=True, bias=True)


@pytest.mark.parametrize(("tokens", "block"), list(zip((1, 16, 33, 64), BLOCKS, strict=False)))
def test_numbers_of_tokens_in_blocks_of_every_width(tokens, block):
    """One token of two experts, and blocks that are full, begun and unused."""
    weights = mixture(layout(4, "trellis", 64, 2), [66], 96, 3)
    check(weights, random_routes(tokens, 2, 3), block, torch.bfloat16, weighted=True)


def test_repeated_choices_and_one_choice():
    weights = mixture(layout(4, "uniform", 64, 1), [20], 96, 3)
    check(weights, torch.tensor([[1, 1, 1], [2, 0, 2]]), BLOCKS[0])
    check(weights, torch.tensor([[2]]), BLOCKS[0])


def test_experts_of_other_ranks():
    """Their routes are left out, or have blocks of the expert -1, as vLLM makes them."""
    block, weights = BLOCKS[0], mixture(layout(4, "trellis", 64, 2), [20], 96, 2)
    ids = torch.tensor([[0, -1], [-1, -1], [1, 0], [-1, 1]])
    check(weights, ids, block, weighted=True)
    everyone = sorted_routes(torch.where(ids < 0, 2, ids).to(DEVICE), 3, block)
    elsewhere = torch.where(everyone.expert_ids == 2, -1, everyone.expert_ids)
    check(weights, ids, block, routes=dataclasses.replace(everyone, expert_ids=elsewhere))
    check(weights, torch.full((3, 2), -1), block)


def test_a_split_of_k(monkeypatch):
    monkeypatch.setattr(op, "splits", lambda *_: 2)
    weights = mixture(layout(4, "uniform", 128, 2), [20, 3], 384, 2)
    for block in (BLOCKS[0], BLOCKS[-1]):
        check(weights, random_routes(5, 1, 2), block, torch.float16, bias=True)


def test_no_tokens():
    weights = mixture(layout(4, "uniform", 128, 0), [8], 64, 2)
    check(weights, torch.zeros(0, 2, dtype=torch.int64), BLOCKS[0])


def test_the_operator_is_one_for_torch():
    weights = mixture(layout(4, "uniform", 128, 0), [3], 32, 2)
    routes = sorted_routes(torch.tensor([[1]], device=DEVICE), 2, BLOCKS[0])
    arguments = (
        torch.randn(1, 32, device=DEVICE), weights.packed, torch.randn(2, 3, device=DEVICE),
        routes.sorted, routes.expert_ids, routes.used, torch.rand(1, device=DEVICE), 1,
        routes.block, True, [3], weights.experts[0].layout.to_text(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.precalib.gpu_grouped_linear.default, arguments)
