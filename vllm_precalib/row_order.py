"""Rows that a model's loader in vLLM reorders, for packed tensors, which it does not know.

Such a loader looks for tensors named "weight". Packed rows are brought into the same order here; a
test looks for loaders of this kind in the installed vLLM.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Rotary halves lie in turn in the checkpoint, one after the other in vLLM
# (Llama4ForCausalLM.permute_qk_weight_for_rotary).
INTERLEAVED_ROTARY = ("llama4_text",)


def rotary_heads(config: Any) -> Mapping[str, int]:
    """Number of heads in each shard whose rows vLLM reorders: {"q": 40, "k": 8}, or nothing.

    config: transformers' configuration of the language model.
    """
    if getattr(config, "model_type", None) not in INTERLEAVED_ROTARY:
        return {}
    return {"q": config.num_attention_heads, "k": config.num_key_value_heads}


def halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads · pairs · 2] of any packed tensor but column_scale, with the halves apart."""
    rows, width = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
