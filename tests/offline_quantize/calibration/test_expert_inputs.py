"""Inputs of experts against those that the model's own experts hand out."""

import pytest
import torch
import transformers
from tiny_models import random_llama

from offline_quantize.calibration.activations import linear_layers, observe
from offline_quantize.calibration.expert_inputs import (
    FEW,
    ExpertInput,
    expert_inputs,
    experts_statistics,
)
from offline_quantize.calibration.model import model_for_pass

EXPERTS, SIZE = 4, 32  # as many outputs as inputs: the last product can be the identity
SIZES = {
    "vocab_size": 97,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MODELS = {
    "plain": (transformers.MixtralConfig, "mlp.experts"),
    "transposed, with biases, rows alternate": (transformers.GptOssConfig, "mlp.experts"),
}


def tiny(config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES)).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def shapes(layers=2, names=("gate_proj", "up_proj", "down_proj")):
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (SIZE, SIZE)
        for layer in range(layers)
        for expert in range(EXPERTS)
        for name in names
    }


@pytest.mark.parametrize(("config", "name"), MODELS.values(), ids=MODELS)
def test_each_expert_has_the_inputs_of_its_tokens(config, name):
    experts = tiny(config).model.layers[0].get_submodule(name)
    tokens = torch.randn(3 * FEW, SIZE)
    chosen = torch.zeros(len(tokens), 2, dtype=torch.int64)
    chosen[:, 1] = 1 + torch.arange(len(tokens)) // (len(tokens) - 5)  # 5 go to expert 2
    with torch.no_grad():
        found = experts_statistics(experts, tokens, chosen)
        experts.down_proj.copy_(torch.eye(SIZE).expand_as(experts.down_proj))
        if experts.has_bias:
            experts.down_proj_bias.zero_()
        for expert, seen in ((0, tokens), (1, tokens[:-5]), (2, tokens), (3, tokens)):
            only = torch.full((len(seen), 1), expert)
            handed_out = experts(seen, only, torch.ones(len(seen), 1))
            torch.testing.assert_close(found[expert][0].mean_square, seen.square().mean(0))
            torch.testing.assert_close(found[expert][1].mean_square, handed_out.square().mean(0))
    assert all(statistics.hessian is None for pair in found for statistics in pair)


@pytest.mark.parametrize(("config", "name"), MODELS.values(), ids=MODELS)
def test_a_pass_knows_the_inputs_of_experts(config, name):
    model = tiny(config)
    wanted = {"model.layers.0.self_attn.o_proj.weight": (SIZE, SIZE), **shapes()}
    layers, experts = linear_layers(model, wanted), expert_inputs(model, wanted)
    assert layers.keys() | experts.keys() == wanted.keys()
    windows = list(torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(0)))
    given = []
    hook = (
        model.model.layers[1]
        .get_submodule(name)
        .register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    )
    found, blocks = {}, []
    for block, statistics in observe(model, windows, layers, experts=experts, hessians=True):
        blocks.append(block)
        found |= statistics
    hook.remove()
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert found.keys() == wanted.keys()
    tokens, chosen, _ = given[0]
    of_expert = tokens[(chosen == 2).any(-1)]
    assert len(of_expert) >= FEW
    for part in ("gate_proj", "up_proj"):
        seen = found[f"model.layers.1.mlp.experts.2.{part}.weight"]
        torch.testing.assert_close(seen.mean_square, of_expert.square().mean(0))
        assert seen.hessian is None
    assert found["model.layers.0.self_attn.o_proj.weight"].hessian is not None


def test_weights_of_other_checkpoints_are_found_by_layer_and_expert():
    model = tiny(transformers.MixtralConfig)
    wanted = {
        f"model.layers.1.block_sparse_moe.experts.3.{name}.weight": (SIZE, SIZE)
        for name in ("w1", "w2", "w3")
    }
    module = "model.layers.1.mlp.experts"
    assert list(expert_inputs(model, wanted).values()) == [
        ExpertInput(module, 3, down) for down in (False, True, False)
    ]
    strange = {
        "model.layers.1.mlp.experts.4.gate_proj.weight": (SIZE, SIZE),  # one more than there are
        "model.layers.2.mlp.experts.0.gate_proj.weight": (SIZE, SIZE),  # no such layer
        "model.layers.0.mlp.experts.0.gate_proj.weight": (SIZE, 2 * SIZE),
        "model.layers.0.mlp.gate.weight": (EXPERTS, SIZE),
    }
    assert expert_inputs(model, strange) == {}
    assert expert_inputs(random_llama(), shapes()) == {}


def test_experts_larger_than_memory_give_the_same(tmp_path):
    tiny(transformers.MixtralConfig).save_pretrained(tmp_path)
    windows = list(torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0)))
    found = []
    for memory in (1 << 30, 60_000):
        with model_for_pass(tmp_path, "cpu", memory) as model:
            devices = {parameter.device.type for parameter in model.model.layers.parameters()}
            assert ("meta" in devices) == (memory < 1 << 30)
            statistics = {}
            for _, block in observe(model, windows, {}, experts=expert_inputs(model, shapes())):
                statistics |= block
            found.append(statistics)
    assert found[0].keys() == found[1].keys() == shapes().keys()
    for name, statistics in found[0].items():
        assert torch.equal(statistics.mean_square, found[1][name].mean_square)
