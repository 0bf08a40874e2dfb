"""Random models small enough to build in a moment."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# config.json of a llama of two layers, two query heads of size 16 for each of four KV heads
GROUPED_QUERY_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def random_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A llama of two layers with grouped-query attention, in float32.

    config: fields of LlamaConfig, sizes above all.
    """
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
