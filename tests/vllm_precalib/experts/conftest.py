"""A layer of experts on a pretended rank."""

import itertools

import pytest
import torch

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.format.checkpoint_config import CheckpointConfig

PREFIX = "model.layers.0.mlp.experts"
HIDDEN, INNER, EXPERTS = 96, 128, 4
SPLIT = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
SHARD_IDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture
def stored(tiny):
    """Packed tensors and layout name by module, as a checkpoint of the layer has them."""
    names = {"gate_proj": "row", "up_proj": "row", "down_proj": "min-max"}
    return {
        (expert, leaf): (tiny.random_packed(tiny.LAYOUTS[names[leaf]], *shape, seed), names[leaf])
        for seed, (expert, (leaf, shape)) in enumerate(
            itertools.product(range(EXPERTS), SPLIT.items())
        )
    }


@pytest.fixture
def make(rank, tiny, stored):
    """`make(additional_config, ranks=(1, 2), …)`: a loaded layer with its method."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    from vllm_precalib.config import PrecalibConfig

    def build(
        additional, index=0, of=1, expert_parallel=False, load=True, edit=None, online=False, **moe
    ):
        tensors = dict(stored)
        if edit:
            edit(tensors)
        modules = {f"{PREFIX}.{e}.{leaf}": name for (e, leaf), (_, name) in tensors.items()}
        layouts = {**tiny.LAYOUTS, "rtn-4": RECIPES["rtn-4"].layout}
        config = PrecalibConfig(None if online else CheckpointConfig("test", layouts, modules))
        whole = expert_parallel or of == 1
        parallel = FusedMoEParallelConfig(
            tp_size=1 if whole else of,
            tp_rank=0 if whole else index,
            pcp_size=1,
            pcp_rank=0,
            dp_size=1,
            dp_rank=0,
            ep_size=of if expert_parallel else 1,
            ep_rank=index if expert_parallel else 0,
            sp_size=1,
            use_ep=expert_parallel,
            all2all_backend="allgather_reducescatter",
            enable_eplb=False,
        )
        manager = ExpertMapManager(64, 2, EXPERTS, 0, None, parallel, "linear", False)
        fields = {"activation": MoEActivation.SILU, "in_dtype": torch.float32, **moe}
        shared = {"weight_inputs": fields.pop("weight_inputs", False)}
        moe_config = FusedMoEConfig(
            num_experts=EXPERTS,
            experts_per_token=2,
            hidden_dim=fields.pop("hidden_dim", HIDDEN),
            intermediate_size=fields.pop("intermediate_size", INNER),
            num_local_experts=manager.local_num_experts,
            num_logical_experts=EXPERTS,
            device="cpu",
            routing_method=RoutingMethodType.Default,
            moe_parallel_config=parallel,
            **fields,
        )
        with rank(index, of, additional_config=additional):
            layer = RoutedExperts(
                PREFIX,
                torch.float32,
                moe_config,
                config,
                manager,
                apply_router_weight_on_input=shared["weight_inputs"],
            )
            if load:
                names = [f"{e}.{leaf}" for e, leaf in tensors]
                list(
                    layer.load_weights(
                        (f"{name}.{tensor}", data)
                        for name, (packed, _) in zip(names, tensors.values(), strict=True)
                        for tensor, data in packed.items()
                    )
                )
                layer.quant_method.process_weights_after_loading(layer)
        layer.choices = config.choices
        return layer

    return build
