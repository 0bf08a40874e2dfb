"""Bits by sensitivity: the target is met, siblings stay together, places that matter get more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import RECIPES, adjust
from offline_quantize.planning.bit_allocation import OPTIONS, allocate, sensitivity
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import RecipeError

SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (544, 256),
    "mlp.up_proj": (544, 256),
    "mlp.down_proj": (256, 544),
}
CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2}


def llama(layers):
    return {f"model.layers.{i}.{name}": SHAPES[name] for i in range(layers) for name in SHAPES}


def bits(weights, allocated):
    stored = sum(allocated[m][1].layout.stored_bytes(*shape) for m, shape in weights.items())
    return 8 * stored / sum(rows * columns for rows, columns in weights.values())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.label)
def test_the_errors_of_the_options_are_those_of_a_normal(option):
    weight = torch.randn((256, 2048), generator=torch.Generator().manual_seed(0))
    measured = encode(weight, option.recipe, "test").statistics.summary()["relative_error"]
    assert option.error == pytest.approx(measured, rel=0.03)


def test_larger_options_err_less():
    sizes = [option.nbytes([(256, 544)]) for option in OPTIONS]
    assert sizes == sorted(set(sizes))
    assert [option.error for option in OPTIONS] == sorted((o.error for o in OPTIONS), reverse=True)


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 12), share=st.floats(0, 1))
def test_every_target_in_reach_is_met_closely_and_siblings_stay_together(layers, share):
    weights = llama(layers)
    ends = [8 * o.nbytes(list(weights.values())) for o in (OPTIONS[0], OPTIONS[-1])]
    count = sum(rows * columns for rows, columns in weights.values())
    target = (ends[0] + share * (ends[1] - ends[0])) / count + 1e-9
    allocated = allocate(weights, target, CONFIG)
    assert allocated.keys() == weights.keys()
    step = 2 * 544 * 256 / count  # the largest unit, one bit more
    assert target - step < bits(weights, allocated) <= target
    for i in range(layers):
        for parts in (("q", "k", "v"), ("gate", "up")):
            own = {
                allocated[name]
                for name in weights
                if f"layers.{i}." in name and name.rpartition(".")[2][:-5] in parts
            }
            assert len(own) == 1
    assert len({recipe.layout.bits for _, recipe in allocated.values()}) <= 2


def test_a_deep_model_meets_its_target_to_the_hundredth():
    weights = llama(32)
    for target in (2.4, 2.8, 3.2, 3.35, 3.6, 3.85, 4.2, 4.5, 4.8, 5.2):
        assert bits(weights, allocate(weights, target, CONFIG)) == pytest.approx(target, abs=0.01)


def test_two_bits_are_taken_only_where_three_do_not_fit():
    weights = llama(12)
    least = next(o for o in OPTIONS if o.recipe.layout.bits == 3).nbytes(list(weights.values()))
    count = sum(rows * columns for rows, columns in weights.values())
    for extra, widths in ((0, {3}), (-1, {2, 3}), (40000, {3, 4})):
        allocated = allocate(weights, (8 * (least + extra) + 0.1) / count, CONFIG)
        assert {recipe.layout.bits for _, recipe in allocated.values()} == widths


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 12), share=st.floats(0, 1))
def test_no_weight_gets_less_than_in_the_largest_uniform_model_that_fits(layers, share):
    weights = llama(layers)
    count = sum(rows * columns for rows, columns in weights.values())
    uniform = [8 * option.nbytes(list(weights.values())) / count for option in OPTIONS]
    target = uniform[0] + share * (uniform[-1] - uniform[0]) + 1e-9
    least = max(i for i, size in enumerate(uniform) if size <= target)
    recipes = [option.recipe for option in OPTIONS]
    allocated = allocate(weights, target, CONFIG)
    assert min(recipes.index(recipe) for _, recipe in allocated.values()) >= least


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.label)
def test_the_size_of_a_uniform_model_gives_that_model(option):
    weights = llama(5)
    count = sum(rows * columns for rows, columns in weights.values())
    target = (8 * option.nbytes(list(weights.values())) + 0.1) / count
    assert {label for label, _ in allocate(weights, target, CONFIG).values()} == {option.label}


def test_more_bits_go_where_errors_weigh_more():
    weights = llama(12)
    allocated = allocate(weights, 3.9, CONFIG)

    def width(module):
        return allocated[module][1].layout.bits

    assert width("model.layers.11.mlp.gate_proj") == 4
    assert width("model.layers.5.mlp.gate_proj") == 3
    assert width("model.layers.5.self_attn.k_proj") == 4


def test_sensitivities():
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    middle = "model.layers.5.self_attn."
    assert sensitivity(middle + "q_proj", 12, config) == 1
    assert sensitivity(middle + "v_proj", 12, config) == 4
    assert sensitivity(middle + "qkv_proj", 12, config) == 2  # (8·1 + 2·4 + 2·4) / 12
    assert sensitivity(middle + "v_proj", 12, config, inputs_known=True) == 2
    assert sensitivity(middle + "qkv_proj", 12, config, inputs_known=True) == 16 / 12
    assert sensitivity(middle + "o_proj", 12, config, inputs_known=True) == 1.5
    assert sensitivity(middle + "v_proj", 12, {}) == 1
    assert sensitivity(middle + "o_proj", 12, config) == 1.5
    assert sensitivity("model.layers.1.mlp.up_proj", 12, config) == 2
    assert sensitivity("model.layers.11.mlp.down_proj", 12, config) == 4.5


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads"])
@pytest.mark.parametrize("value", [0, -1, True, 1 << 400, float("nan"), "8", [8], None])
def test_numbers_of_heads_that_tell_nothing(field, value):
    config = {"num_attention_heads": 8, "num_key_value_heads": 8, field: value}
    assert sensitivity("model.layers.5.self_attn.v_proj", 12, config) == 1


def test_all_experts_of_a_layer_get_one_layout():
    weights = {
        f"model.layers.{i}.mlp.experts.{e}.{name}_proj": (96, 256)
        for i in range(4)
        for e in range(3)
        for name in ("gate", "up")
    }
    allocated = allocate(weights, 4.0, {})
    for i in range(4):
        assert len({allocated[m] for m in weights if f"layers.{i}." in m}) == 1
    assert len(set(allocated.values())) > 1


def test_weights_that_are_decided_count():
    weights = llama(6)
    count = sum(rows * columns for rows, columns in weights.values())
    alone = allocate(weights, 3.8, CONFIG)
    beside = allocate(weights, 3.8, CONFIG, fixed=(count, int(count * 4.2 / 8)))
    assert bits(weights, beside) == pytest.approx(3.4, abs=0.01)
    assert bits(weights, alone) == pytest.approx(3.8, abs=0.01)


@pytest.mark.parametrize("target", [2.1, 5.9])
def test_targets_out_of_reach_name_the_range(target):
    with pytest.raises(RecipeError, match=rf"--target-bits {target:g} .* between 2\.3\d\d and 5\."):
        allocate(llama(2), target, CONFIG)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recipe": "rtn-4"}, r"^--target-bits 4 chooses .* leave out --recipe rtn-4$"),
        ({"changes": {"alpha": None, "bits": 3}}, r"leave out --bits 3$"),
        ({"target_bits": float("nan")}, r"^--target-bits nan: give a finite number"),
        ({"target_bits": 2.0}, r"^--target-bits 2 cannot be met: .* between 2\.\d+ and 5\.\d+"),
        ({"overrides": [("q_proj", "rtn-3")]}, r"^vLLM computes these as one layer, .*\(rtn-3\)"),
    ],
)
def test_options_that_do_not_fit(checkpoint, options, text):
    with pytest.raises(RecipeError, match=text):
        make_plan(open_checkpoint(checkpoint()), Options(**({"target_bits": 4.0} | options)))


def test_the_size_is_known_before_and_true_after(checkpoint, quantize):
    source = checkpoint(config={"num_hidden_layers": 2, **CONFIG})
    options = Options(overrides=[("down_proj", "paper-3")], target_bits=4.0)
    plan = make_plan(open_checkpoint(source), options)
    given = ("--target-bits", 4.0, "--override", "down_proj=paper-3")
    manifest = read_manifest(quantize(source, *given))
    assert manifest.totals.stored_bytes == plan.stored_bytes
    assert 3.9 < manifest.totals.bits_per_weight <= 4
    assert manifest.tensors["model.layers.0.mlp.down_proj"].recipe == "paper-3"
    assert manifest.run.recipe == "--target-bits 4"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.label)
def test_labels_make_their_recipes_again(option):
    name, *flags = option.label.split()
    given = dict(zip(flags[::2], map(float, flags[1::2]), strict=True))
    changes = {"alpha": given.get("--alpha")}
    if "--salient-bits" in given:
        changes["salient_bits"] = int(given["--salient-bits"])
    assert adjust(RECIPES[name], **changes) == option.recipe
