"""An ordinary checkpoint, quantized while it is loaded: the method for each of its layers."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from vllm_precalib.backends import Options
from vllm_precalib.compat import vllm_names
from vllm_precalib.encoder_pool import EncoderPool
from vllm_precalib.experts.packed_experts import GATE_UP
from vllm_precalib.online_linear_method import OnlineLinearMethod
from vllm_precalib.online_plan import OnlineExpertPair, OnlinePlan
from vllm_precalib.tied_head import TiedHeadMethod
from vllm_precalib.undecided_linear_method import CheckedLinearMethod

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

with vllm_names():
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger("vllm.precalib")
EMBEDDINGS = "model.embed_tokens"


class OnlineQuantizer:
    """What the layers of one model share: the choice of recipes, and the threads that encode.

    registry: backends to choose from, None for the plugin's own.
    choices:  gets the choice for each packed layer, by vLLM's name.

    Raises ServingError for options that are wrong by themselves.
    """

    def __init__(
        self, registry: BackendRegistry | None, choices: MutableMapping[str, BackendChoice]
    ) -> None:
        self.registry = registry
        self.choices = choices
        self.pool = EncoderPool()
        self.whole_experts: list[str] = []  # layers that get a tensor of all experts
        config = get_current_vllm_config()
        options, model = Options.parse(config.additional_config), config.model_config
        configs: list[Mapping[str, Any]] = []
        if model is not None:
            configs = [model.hf_config.to_dict(), model.hf_text_config.to_dict()]
        self.plan = OnlinePlan(options.recipes, *configs)
        logger.info_once(
            "precalib quantizes the model while it is loaded: recipe %s", options.recipes.label
        )

    def method(
        self, kind: str | None, layer: Any, prefix: str, fused: Mapping[str, Sequence[str]]
    ) -> QuantizeMethodBase | None:
        """The method for a layer of this `layer_kind`; None where vLLM's own default is right."""
        if kind == "experts":
            return self._experts(layer, prefix)
        if kind is None:
            return None
        if kind == "embedding":
            prefix = prefix or EMBEDDINGS  # some models do not tell
        elif kind == "head" and self.plan.tied:
            return TiedHeadMethod(prefix, EMBEDDINGS)
        planned = self.plan.module(prefix, _shape(layer), fused)
        if not isinstance(planned, str):
            arguments = prefix, planned, self.registry, self.choices, self.pool
            return OnlineLinearMethod(*arguments, rows=kind == "embedding")
        if kind != "linear":
            return None
        self._log(prefix, planned)
        return CheckedLinearMethod(prefix)

    def check_used(self) -> None:
        """Raise ServingError for a pattern that matches no module, once all layers are made."""
        config = get_current_vllm_config()
        whole = config.parallel_config.pipeline_parallel_size == 1
        if whole and config.model_config and config.model_config.runner_type != "draft":
            self.plan.check_used()

    def expert_names(self) -> "WeightsMapper":
        """New names for tensors that vLLM's loader would not hand to our parameters."""
        from vllm.model_executor.models.utils import WeightsMapper

        if not self.whole_experts:
            return WeightsMapper()
        from vllm_precalib.experts.online import whole_expert_names

        return whole_expert_names(self.whole_experts)

    def _experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        # imported here so that a vLLM without these names can still serve other models
        from vllm_precalib.experts.choice import stay_packed
        from vllm_precalib.experts.online import online_experts_method

        moe = layer.moe_config
        gate, up = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
        split = (gate,) if up is None else (gate, up)
        planned: OnlineExpertPair | str = self.plan.experts(
            prefix,
            moe.num_logical_experts,
            (moe.intermediate_size_per_partition * moe.tp_size, moe.hidden_dim),
            (GATE_UP,) if self.plan.whole_experts else split,
            layer.ckpt_down_proj_name,
        )
        if not isinstance(planned, str) and not stay_packed(layer, planned.packed, self.registry):
            planned = "no backend here computes packed experts"
        if isinstance(planned, str):
            self._log(prefix, planned)
            return None
        if self.plan.whole_experts:
            self.whole_experts.append(prefix)
        return online_experts_method(
            layer, planned.packed, planned.recipes, self.registry, self.choices, self.pool
        )

    def _log(self, prefix: str, reason: str) -> None:
        leaf = prefix.rpartition(".")[2] or "layers without a name"
        logger.info_once("precalib leaves %s unquantized: %s", leaf, reason)


def _shape(layer: Any) -> tuple[int, int]:
    """N and K of the whole layer."""
    if isinstance(layer, LinearBase):
        return layer.output_size, layer.input_size
    return layer.org_vocab_size, layer.embedding_dim
