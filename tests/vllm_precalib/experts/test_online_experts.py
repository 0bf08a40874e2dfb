"""Experts that are packed while they are loaded hold what the quantizer writes."""

import pytest
import torch

from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import RECIPES
from precalib_kernels.errors import ServingError

PREFIX, EXPERTS = "model.layers.0.mlp.experts", 4
WIDE = {"hidden_dim": 160, "intermediate_size": 256}  # of experts that every recipe takes


@pytest.fixture
def unquantized():
    """Weight by module."""
    torch.manual_seed(5)
    hidden, inner = WIDE.values()
    shapes = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return {
        (expert, leaf): (torch.randn(shape) * 0.02).bfloat16()
        for expert in range(EXPERTS)
        for leaf, shape in shapes.items()
    }


@pytest.fixture
def quantized_twice(make, unquantized):
    """`quantized_twice(backend, index, …)`: a layer packed as it is loaded, and one from before."""

    def build(backend, *place, **options):
        ours = {"backend": backend}

        def replace(tensors, weight=False):
            for (expert, leaf), matrix in unquantized.items():
                packed = {"weight": matrix}
                if not weight:
                    packed = encode(matrix, RECIPES["rtn-4"], "test").tensors
                tensors[expert, leaf] = packed, "rtn-4"

        before = make({"precalib": ours}, *place, edit=replace, **WIDE, **options)
        made = make(
            {"precalib": {**ours, "recipe": "rtn-4"}},
            *place,
            edit=lambda tensors: replace(tensors, weight=True),
            online=True,
            **WIDE,
            **options,
        )
        return made, before

    return build


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("of", [1, 2])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_packed_while_they_are_loaded(quantized_twice, backend, of, expert_parallel):
    """Each rank holds its part of what the quantizer writes."""
    for index in range(of):
        made, before = quantized_twice(backend, index, of, expert_parallel=expert_parallel)
        found, expected = dict(made.named_parameters()), dict(before.named_parameters())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop((2, "up_proj")), rf"^{PREFIX}\.2\.up_proj\.weight was not in the check"),
        (
            lambda w: w[1, "down_proj"].fill_(torch.nan),
            rf"^{PREFIX}\.1\.down_proj\.weight: weight \[0, 0\] is nan; .*unquantized: --addit",
        ),
    ],
)
def test_experts_that_cannot_be_packed_are_named(make, unquantized, damage, message):
    damage(unquantized)

    def replace(tensors):
        tensors.clear()
        tensors.update({k: ({"weight": w}, "rtn-4") for k, w in unquantized.items()})

    with pytest.raises(ServingError, match=message):
        make({"precalib": {"backend": "reference"}}, edit=replace, online=True, **WIDE)


def test_experts_of_one_layer_are_kept_or_packed_together(make):
    with pytest.raises(ServingError, match=r'"keep" treats .*0\.gate_proj, .* differently, which'):
        make({"precalib": {"keep": [r"experts\.3"]}}, load=False, online=True, **WIDE)
    for ours in ({"keep": [r"\.experts\."]}, {"backend": "reference", "recipe": "rtn-4"}):
        narrow = {} if "backend" in ours else WIDE  # 96 inputs are fewer than a group
        layer = make({"precalib": ours}, load=False, online=True, **narrow)
        assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"
