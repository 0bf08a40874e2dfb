"""An ordinary checkpoint, quantized while it is loaded: the method for each of its layers."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from vllm_precalib.backends import Options
from vllm_precalib.compat import vllm_names
from vllm_precalib.encoder_pool import EncoderPool
from vllm_precalib.online_linear_method import OnlineLinearMethod
from vllm_precalib.online_plan import OnlinePlan
from vllm_precalib.undecided_linear_method import CheckedLinearMethod

with vllm_names():
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger("vllm.precalib")


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
        if kind not in ("linear", "head"):
            return None
        planned = self.plan.module(prefix, (layer.output_size, layer.input_size), fused)
        if not isinstance(planned, str):
            return OnlineLinearMethod(prefix, planned, self.registry, self.choices, self.pool)
        if kind == "head":
            return None
        leaf = prefix.rpartition(".")[2] or "layers without a name"
        logger.info_once("precalib leaves %s unquantized: %s", leaf, planned)
        return CheckedLinearMethod(prefix)
