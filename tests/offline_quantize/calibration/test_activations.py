"""Input statistics against sums that are taken by hand."""

import pytest
import torch
from tiny_models import random_llama

from offline_quantize.calibration.activations import input_statistics, linear_layers, observe
from offline_quantize.calibration.model import model_for_pass

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
PROJECTIONS = 7


@pytest.fixture(scope="module")
def model():
    return random_llama(**SIZES).eval()


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(97, (4, 11), generator=generator))


def shapes(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("proj.weight")}


def inputs_of(model, windows, module):
    """Every input of a layer, [tokens, K], window by window."""
    seen = []
    layer = model.get_submodule(module)
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].squeeze(0)))
    with torch.inference_mode():
        for window in windows:
            model(window[None])
    hook.remove()
    return torch.cat(seen).double()


def test_moments_are_those_of_the_inputs(model, windows):
    layers = linear_layers(model, shapes(model))
    assert len(layers) == 3 * PROJECTIONS
    found = {}
    blocks = []
    for block, statistics in observe(model, windows, layers, hessians=True):
        blocks.append(block)
        assert len(statistics) == PROJECTIONS
        found |= statistics
    assert blocks == [f"model.layers.{i}" for i in range(3)]
    for name, module in layers.items():
        x = inputs_of(model, windows, module)
        expected = torch.einsum("tj,tk->jk", x, x) / (4 * 11)
        torch.testing.assert_close(found[name].hessian.double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found[name].mean_square.double(), expected.diagonal(), rtol=1e-4, atol=1e-6
        )


def test_layers_that_share_an_input_share_its_statistics(model, windows):
    layers = linear_layers(model, shapes(model))
    _, first = next(iter(observe(model, windows, layers, hessians=True)))
    of = {name.split(".")[-2]: statistics for name, statistics in first.items()}
    assert of["q_proj"] is of["k_proj"] is of["v_proj"]
    assert of["gate_proj"] is of["up_proj"]
    assert len({id(statistics) for statistics in of.values()}) == 4


def test_without_hessians_there_are_none(model, windows):
    for _, statistics in observe(model, windows, linear_layers(model, shapes(model))):
        assert all(found.hessian is None for found in statistics.values())


def test_the_pass_waits_and_ends_when_nobody_listens(model, windows):
    reached = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: reached.append(1))
    blocks = observe(model, windows, linear_layers(model, shapes(model)))
    assert next(blocks)[0] == "model.layers.0"
    assert not reached
    blocks.close()
    hook.remove()
    assert not reached
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_fails_in_the_model_reaches_the_caller(model, windows):
    def fail(*_):
        raise ValueError("the model is broken")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    blocks = observe(model, windows, linear_layers(model, shapes(model)))
    next(blocks)
    next(blocks)
    with pytest.raises(ValueError, match="the model is broken"):
        next(blocks)
    hook.remove()


def test_names_agree_from_the_layer_on(model):
    wanted = {
        "language_model.model.layers.0.mlp.up_proj.weight": (96, 64),
        "layers.1.mlp.up_proj.weight": (96, 64),
        "model.layers.2.mlp.up_proj.weight": (95, 64),  # another shape
        "model.layers.9.mlp.up_proj.weight": (96, 64),  # no such layer
        "lm_head.weight": (97, 64),  # no layer at all
    }
    assert linear_layers(model, wanted) == {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj",
        "layers.1.mlp.up_proj.weight": "model.layers.1.mlp.up_proj",
    }


def test_two_towers_are_told_apart_by_the_whole_name(model):
    towers = torch.nn.ModuleDict({"text": model, "vision": random_llama(**SIZES)})
    one, other = "text.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"
    wanted = {f"{one}.weight": (96, 64), f"{other}.weight": (96, 64)}
    assert linear_layers(towers, wanted) == {f"{one}.weight": one}


def test_leading_dimensions_are_all_the_same():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    one, other = input_statistics(x, True), input_statistics(x.reshape(30, 8), True)
    torch.testing.assert_close(one.mean_square, other.mean_square)
    torch.testing.assert_close(one.hessian, other.hessian)


def test_moments_of_bfloat16_inputs_are_as_exact_as_those_of_float32():
    x = torch.randn(600, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().T @ x.double() / len(x)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    for given in (x, x.float()):
        hessian = input_statistics(given, True).hessian
        assert hessian.dtype == torch.float32
        assert float((hessian - exact).abs().max()) < 3e-6 * float(exact.max())
        assert settings.fp32_precision == before
    rough = torch.randn(600, 200, generator=torch.Generator().manual_seed(1))
    exact = rough.double().T @ rough.double() / len(x)
    hessian = input_statistics(rough, True).hessian  # would be 1e-3 off in bfloat16
    assert float((hessian - exact).abs().max()) < 3e-6 * float(exact.max())


def test_a_model_larger_than_memory_gives_the_same(byte_llama, windows, caplog):
    source = byte_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    found = []
    for memory in (1 << 30, 150_000):  # the second is less than embeddings and two layers
        with model_for_pass(source, "cpu", memory) as model:
            parts = [parameter.device.type for parameter in model.model.layers.parameters()]
            assert ("meta" in parts) == (memory < 1 << 30)
            layers = linear_layers(model, shapes(model))
            statistics = {}
            for _, block in observe(model, windows, layers, hessians=True):
                statistics |= block
            found.append(statistics)
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 3 * PROJECTIONS
    for name, statistics in found[0].items():
        assert torch.equal(statistics.hessian, found[1][name].hessian)
    assert not caplog.messages  # accelerate would tell of parts that stay on disk


def test_the_head_comes_last_with_what_the_blocks_give_it(model, windows):
    layers = linear_layers(model, shapes(model))
    *_, last = observe(model, windows, layers, head="lm_head.weight", hessians=True)
    assert last[0] == "head"
    x = inputs_of(model, windows, "lm_head")
    expected = torch.einsum("tj,tk->jk", x, x) / (4 * 11)
    found = last[1]["lm_head.weight"]
    torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_pass_ends_when_nobody_wants_the_head(model, windows):
    layers = linear_layers(model, shapes(model))
    blocks = observe(model, windows, layers, head="lm_head.weight")
    for name, _ in blocks:
        if name == "head":
            break
    blocks.close()  # a pass that waits for ever would hang here
    again = observe(model, windows, layers, head="lm_head.weight")
    for name, _ in again:
        if name == "model.layers.2":
            break
    again.close()


def test_the_pass_has_its_threads_and_the_others_have_one(model, windows):
    inside = []
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda *_: inside.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    try:
        outside = [
            torch.get_num_threads()
            for _ in observe(model, windows, linear_layers(model, shapes(model)), threads=2)
        ]
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert inside == [2]
    assert len(outside) == 3


def test_several_weights_never_share_a_module(model):
    wanted = {f"{tower}.layers.0.mlp.up_proj.weight": (96, 64) for tower in ("encoder", "decoder")}
    assert linear_layers(model, wanted) == {}
    namesake = "model.layers.0.mlp.up_proj.weight"
    wanted |= {namesake: (96, 64)}
    assert linear_layers(model, wanted) == {namesake: "model.layers.0.mlp.up_proj"}
