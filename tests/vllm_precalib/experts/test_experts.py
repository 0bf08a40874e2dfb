"""A layer of packed experts on a pretended rank, against what the reference unpacks."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

from precalib_kernels.backends.reference import ReferenceBackend, unpacked_weight
from precalib_kernels.backends.registry import BackendRegistry
from precalib_kernels.backends.routes import Routes
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.triton.memory_layout import reason_against
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib.experts import choice
from vllm_precalib.experts import grouped as grouped_products

PREFIX = "model.layers.0.mlp.experts"
HIDDEN, INNER, EXPERTS = 96, 128, 4
SPLIT = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
SHARD_IDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def compute(layer, x, weights, ids):
    """What the layer computes, without the operator, which needs a running engine."""
    from vllm_precalib.experts.method import PackedExpertsMethod

    method = layer.quant_method
    if isinstance(method, PackedExpertsMethod):
        return method.compute(layer, x, weights, ids)
    return method.apply(layer, x, weights, ids, None, None)


class LoopedBackend(ReferenceBackend):
    """Grouped products place by place; what it must not be asked for is not a number."""

    name = "looped"
    grouped = True

    def apply_grouped(self, layer, x, bias, grouping):
        routes, experts = grouping.routes, grouping.routes.expert_ids.tolist()
        y = x.new_full((len(x) * grouping.top_k, self.spec.output_size), torch.nan)
        if not grouping.complete:
            y.zero_()
        for place, route in enumerate(routes.sorted[: int(routes.used)].tolist()):
            expert = experts[place // routes.block]
            if route < len(y) and expert >= 0:
                tensors = {name: layer.get_parameter(name)[expert] for name in self.names}
                weight = unpacked_weight(tensors, self.spec, "test")
                y[route] = weight @ x[route // grouping.top_k]
                y[route] += 0 if bias is None else bias[expert]
                y[route] *= 1 if grouping.factors is None else grouping.factors[route]
        return y

    def route_block(self, rows):
        return 2 if rows <= 2 else 4

    def row_limits(self):
        return 2, 4


class InterpretedBackend(TritonBackend):
    """The kernels where Triton interprets them, on a CPU."""

    @classmethod
    def can_run(cls, spec):
        return reason_against(spec.layout)


# test_interpreted.py runs the tests below once more, with the second of them
GROUPED = [LoopedBackend, *([InterpretedBackend] if op.interpreted() else [])]


@pytest.fixture(params=GROUPED, ids=lambda backend: backend.name)
def grouped(request, monkeypatch):
    """`additional` of a backend that has grouped products, and how exact they are."""
    registry = BackendRegistry([request.param])
    monkeypatch.setattr(choice, "plugin_registry", lambda: registry)
    # float16 activations are off by 2**-11, and so is the difference of a salient weight
    tolerance = 1e-4 if request.param is LoopedBackend else 1e-2
    return {"precalib": {"backend": request.param.name}}, tolerance


@pytest.fixture
def expected(tiny, stored):
    """The sum by its definition, token by token; `only`: the experts that take part."""

    def weight(expert, leaf):
        packed, name = stored[expert, leaf]
        return dequantize(packed, tiny.LAYOUTS[name], SPLIT[leaf][1])

    def total(x, weights, ids, only=range(EXPERTS)):
        result = torch.zeros(x.shape, dtype=torch.float64)
        for token, slot in itertools.product(*map(range, ids.shape)):
            expert = int(ids[token, slot])
            if expert in only:
                gate, up, down = (weight(expert, leaf).double() for leaf in SPLIT)
                row = x[token].double()
                inner = torch.nn.functional.silu(gate @ row) * (up @ row)
                result[token] += float(weights[token, slot]) * (down @ inner)
        return result

    return total


def routed(tokens=7, chosen=2, seed=0):
    """Inputs, weights and experts: expert 3 gets nothing, token 0 names one expert twice."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights = torch.rand(tokens, chosen, generator=generator)
    ids = torch.randint(0, EXPERTS - 1, (tokens, chosen), generator=generator)
    ids[0] = 1
    return x, weights, ids.int()


def assert_close(found, expected, tolerance=1e-4):
    # each product rounds to float32 after at most 128 additions; sizes are about 1
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_it_is_the_weighted_sum_over_the_chosen_experts(make, expected, additional, tokens):
    layer, inputs = make(additional), routed(tokens)
    assert_close(compute(layer, *inputs), expected(*inputs))
    backend = additional["precalib"]["backend"]
    assert {(name, choice.backend.name) for name, choice in layer.choices.items()} == {
        (f"{PREFIX}.{matrix}", backend) for matrix in ("w13", "w2")
    }


def test_tensor_parallel_slices_add_up(make, expected, additional):
    inputs = routed()
    parts = [compute(make(additional, index, 2), *inputs) for index in range(2)]
    assert_close(sum(parts), expected(*inputs))


def test_expert_parallel_ranks_compute_their_own_experts(make, expected, additional):
    inputs = routed()
    for index, own in enumerate([(0, 1), (2, 3)]):
        layer = make(additional, index, 2, expert_parallel=True)
        assert layer.expert_map.tolist() == [[0, 1, -1, -1], [-1, -1, 0, 1]][index]
        assert_close(compute(layer, *inputs), expected(*inputs, only=own))


def test_weights_may_be_multiplied_into_the_inputs(make, expected):
    x, weights, ids = routed(chosen=1)
    layer = make({}, weight_inputs=True)
    assert_close(
        compute(layer, x, weights, ids), expected(x * weights, torch.ones_like(weights), ids)
    )


def test_experts_without_rows_are_not_computed(make, monkeypatch):
    layer, (x, weights, ids) = make({}), routed()
    backend, seen = layer.quant_method.backends[0], []

    def apply(view, rows, bias):
        seen.append((view.expert, len(rows)))
        return type(backend).apply(backend, view, rows, bias)

    monkeypatch.setattr(backend, "apply", apply)
    compute(layer, x, weights, ids)
    counts = ids.flatten().bincount(minlength=EXPERTS).tolist()
    assert seen == [(expert, count) for expert, count in enumerate(counts) if count]
    assert 3 not in dict(seen)


def test_grouped_products_are_the_weighted_sum(make, expected, grouped):
    additional, tolerance = grouped
    layer, inputs = make(additional), routed(5)
    assert layer.quant_method.grouped
    assert_close(compute(layer, *inputs), expected(*inputs), tolerance)


def test_grouped_products_of_expert_parallel_ranks(make, expected, grouped):
    additional, tolerance = grouped
    inputs = routed(4)
    for index, own in enumerate([(0, 1), (2, 3)]):
        layer = make(additional, index, 2, expert_parallel=True)
        assert_close(compute(layer, *inputs), expected(*inputs, only=own), tolerance)


def test_grouped_products_of_weighted_inputs(make, expected, grouped):
    additional, tolerance = grouped
    x, weights, ids = routed(3, chosen=1)
    layer = make(additional, weight_inputs=True)
    sums = expected(x * weights, torch.ones_like(weights), ids)
    assert_close(compute(layer, x, weights, ids), sums, tolerance)


def test_grouped_products_with_a_bias(make, expected, grouped):
    additional, tolerance = grouped
    layer, (x, weights, ids) = make(additional), routed(3)
    shift = torch.randn(EXPERTS, HIDDEN)
    layer.register_parameter("w2_bias", torch.nn.Parameter(shift, requires_grad=False))
    sums = expected(x, weights, ids) + (shift[ids.long()] * weights[..., None]).sum(1)
    assert_close(compute(layer, x, weights, ids), sums, tolerance)


def test_no_tokens_are_no_work(make, grouped):
    additional, _ = grouped
    x, weights, ids = routed(1)
    assert compute(make(additional), x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)


def test_many_tokens_are_taken_some_at_a_time(make, expected, grouped, monkeypatch):
    additional, tolerance = grouped
    monkeypatch.setattr(grouped_products, "MOST_ROUTES", 4)
    layer, inputs = make(additional), routed(5)
    assert_close(compute(layer, *inputs), expected(*inputs), tolerance)


def test_vllm_sorts_routes_on_a_gpu(monkeypatch):
    """Its function takes what it is given here, and says what `Routes` are made of."""
    signature, seen = inspect.signature(grouped_products.moe_align_block_size), []

    def align(*arguments, **options):
        seen.append(signature.bind(*arguments, **options).arguments)
        return ("sorted", "experts", "used")

    monkeypatch.setattr(grouped_products, "moe_align_block_size", align)
    ids = SimpleNamespace(is_cuda=True, numel=lambda: 20)
    sorting = grouped_products.Sorting(4, "map", lambda rows: 8 * rows)
    assert sorting.routes(ids) == Routes("sorted", "experts", "used", 40)
    expected = {"topk_ids": ids, "block_size": 40, "num_experts": 4, "expert_map": "map"}
    assert seen == [{**expected, "ignore_invalid_experts": True}]


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens"),
    [(128, 8, [1, 128, 129, 256, 257, 512, 513, 2048]), (2, 2, [1, 8, 9, 16, 17, 32, 33, 8192])],
)
def test_the_first_and_the_last_number_of_tokens_of_every_kernel_warm_it_up(
    experts, chosen, tokens
):
    found = list(grouped_products.warm_up_tokens((8, 16, 32, 64), experts, chosen))
    assert found == tokens


def test_graphs_cannot_record_experts_one_after_the_other(make, monkeypatch):
    layer = make({})
    monkeypatch.setattr(choice, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=False))
    with pytest.raises(ServingError, match="which no CUDA graph can record"):
        choice._check_options(layer, PREFIX, config, dense=False, grouped=False)
    choice._check_options(layer, PREFIX, config, dense=False, grouped=True)
    choice._check_options(layer, PREFIX, config, dense=True, grouped=False)


@pytest.mark.parametrize("name", ["trellis", "sign"])
def test_tensor_parallel_slices_may_cut_groups(make, expected, additional, tiny, stored, name):
    """Four ranks of 32 inputs each, in groups of 64."""
    for expert in range(EXPERTS):
        packed = tiny.random_packed(tiny.LAYOUTS[name], HIDDEN, INNER, 100 + expert)
        stored[expert, "down_proj"] = packed, name
    inputs = routed()
    parts = [compute(make(additional, index, 4), *inputs) for index in range(4)]
    assert_close(sum(parts), expected(*inputs))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t[2, "up_proj"][0].pop("scales"), r"experts\.2\.up_proj\.scales was not in"),
        (
            lambda t: t[1, "down_proj"][0].update(scales=torch.full((HIDDEN, 4), torch.inf).half()),
            r"experts\.1\.down_proj\.scales is not finite",
        ),
        (
            lambda t: t[0, "gate_proj"][0].update(qweight=torch.zeros(4, 4, dtype=torch.uint8)),
            r"experts\.0\.gate_proj\.qweight is \[4, 4\] torch\.uint8 in the checkpoint, expected",
        ),
        (lambda t: t.pop((3, "down_proj")), r"expert 3 has no packed 'down_proj'"),
        (
            lambda t: t.update({(1, "down_proj"): (t[1, "down_proj"][0], "row")}),
            r"0\.down_proj \(min-max\) and 1\.down_proj \(row\) are not",
        ),
        (lambda t: t.update({(4, "up_proj"): t[3, "up_proj"]}), r"has a packed expert 4, but"),
    ],
)
def test_what_is_not_whole_or_not_alike_is_refused(make, spoil, message):
    with pytest.raises(ServingError, match=message):
        make({}, edit=spoil)


def test_experts_that_vllm_calls_otherwise_are_refused(tiny):
    from vllm_precalib.experts.packed_experts import find_packed_experts

    modules = {f"model.layers.1.ffn.experts.0.{leaf}": "row" for leaf in SPLIT}
    checkpoint = CheckpointConfig("test", tiny.LAYOUTS, modules)
    names = ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(ServingError, match="packed experts of this layer under another name, mod"):
        find_packed_experts(checkpoint, "language_model.layers.1.mlp.experts", 1, *names)
    assert find_packed_experts(checkpoint, "model.layers.11.mlp.experts", 1, *names) is None
    found = find_packed_experts(checkpoint, "model.layers.1.ffn.experts", 1, *names)
    assert found.gate_up.shards == ("gate_proj", "up_proj")


def test_the_experts_of_another_rank_need_not_come(make):
    def lacking(tensors):
        tensors[0, "up_proj"][0].pop("scales")

    make({}, 1, 2, expert_parallel=True, edit=lacking)
    with pytest.raises(ServingError, match=r"experts\.0\.up_proj\.scales was not in"):
        make({}, 0, 2, expert_parallel=True)


def test_lora_is_refused_in_a_sentence(make):
    with pytest.raises(ServingError, match="packed experts cannot have adapters"):
        make({}, is_lora_enabled=True, load=False)


def test_activations_that_are_not_known_are_refused(make):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    with pytest.raises(ServingError, match="with the activation 'situ'"):
        make({}, activation=MoEActivation.SITU, load=False)
