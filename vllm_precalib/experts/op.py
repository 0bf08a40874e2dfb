"""`precalib::experts`: the experts of a layer as one operator, opaque to torch.compile.

Which experts compute depends on the tokens, so nothing of it can be traced. Like vLLM's own
operator, it finds its layer by name in the forward context.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import get_layer_from_name


def experts(x: Tensor, weights: Tensor, ids: Tensor, layer_name: str) -> Tensor:
    """Σ over the chosen experts of this rank, of the shape and type of x [tokens, hidden].

    weights, ids: [tokens, chosen].
    """
    result: Tensor = torch.ops.precalib.experts(x, weights, ids, layer_name)
    return result


def _experts(x: Tensor, weights: Tensor, ids: Tensor, layer_name: str) -> Tensor:
    layer: Any = get_layer_from_name(layer_name).routed_experts
    result: Tensor = layer.quant_method.compute(layer, x, weights, ids)
    return result


def _fake(x: Tensor, weights: Tensor, ids: Tensor, layer_name: str) -> Tensor:
    del weights, ids, layer_name
    return torch.empty_like(x)


torch.library.define(
    "precalib::experts",
    "(Tensor x, Tensor weights, Tensor ids, str layer_name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("precalib::experts", _fake)
torch.library.register_kernel("precalib::experts", None, _experts)
