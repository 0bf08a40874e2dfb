"""A packed mixture of experts as a model of transformers."""

import torch
import transformers

from offline_quantize.evaluation.models import load_original, load_packed


def test_it_is_the_model_that_dequantizing_gives(quantize, precalib, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**sizes, **experts, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    packed = quantize(tmp_path / "source", "--group-size", 32)
    back = tmp_path / "back"
    assert precalib("dequantize", packed, back, "--dtype", "float32").code == 0
    served = load_packed(packed, torch.float32, "cpu").state_dict()
    expected = load_original(back, torch.float32, "cpu").state_dict()
    assert served.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(served[name], tensor)
    changed = [n for n in expected if not torch.equal(expected[n], model.state_dict()[n])]
    assert "model.layers.0.mlp.experts.gate_up_proj" in changed
