"""A layer of packed experts on a pretended rank, against what the reference unpacks."""

import itertools

import pytest
import torch

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize

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


def assert_close(found, expected):
    # each product rounds to float32 after at most 128 additions; sizes are about 1
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


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


def test_a_group_that_ranks_would_share_is_refused(make, tiny):
    def wider(tensors):
        for expert in range(EXPERTS):
            packed = tiny.random_packed(tiny.TRELLIS, HIDDEN, INNER)
            tensors[expert, "down_proj"] = packed, "trellis"  # groups of 64

    with pytest.raises(ServingError, match=r"inputs of the experts' down projections in groups"):
        make({}, 0, 4, edit=wider)
    make({}, 0, 4, edit=wider, expert_parallel=True)


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
