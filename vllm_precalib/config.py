"""`PrecalibConfig`: which layers of a model are packed, and how."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from offline_quantize.planning import families
from offline_quantize.planning.selection import HEAD
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import QUANT_METHOD, CheckpointConfig
from vllm_precalib.compat import vllm_names
from vllm_precalib.experts.packed_experts import expert_names
from vllm_precalib.packed_module import PackedModule, find_packed_module

with vllm_names():
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import (
        QuantizationConfig,
        QuantizeMethodBase,
    )


if TYPE_CHECKING:
    from vllm_precalib.online_quantizer import OnlineQuantizer

WEIGHT = ".weight"
PACKED_WEIGHT = ".qweight"
# Ways of loading that bring tensors as they are after loading, not those of a checkpoint.
PROCESSED = frozenset(("ipc_cache", "runai_streamer_sharded", "sharded_state", "tensorizer"))


class PrecalibConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's quantization_config.

    It is built in the main process and pickled to the others, so it holds plain data only.

    packed:     whether the checkpoint is; else it is quantized while it is loaded.
    checkpoint: quantization_config, parsed.
    registry:   backends to choose from, None for the plugin's own.
    head_expected: whether this process has made packed layers of a model that it generates with,
                but no packed output head.
    choices:    which backend computes each packed layer that this process has made, by vLLM's
                name of the layer. Elsewhere, ask for a file: see `backends.Options`.
    """

    def __init__(
        self,
        checkpoint: CheckpointConfig | None = None,
        registry: BackendRegistry | None = None,
    ) -> None:
        super().__init__()
        # vLLM passes nothing when config.json has no quantization_config
        self.packed = checkpoint is not None
        self.checkpoint = checkpoint or CheckpointConfig("", {}, {})
        self.quantizer: OnlineQuantizer | None = None
        self.registry = registry
        self.choices: dict[str, BackendChoice] = {}
        self.head_expected: bool | None = None
        self.architectures: set[str] | None = None  # of the model; None until it was looked at

    def get_name(self) -> Any:
        """The name users give to --quantization."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every type vLLM serves in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is too old: the fallback backends are plain torch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PrecalibConfig":
        """Parse quantization_config. Raises FormatError."""
        return cls(CheckpointConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules of the checkpoint to what this model class calls them."""
        names = {}
        for module in (*self.checkpoint.modules, *self.checkpoint.tied):
            name = hf_to_vllm_mapper.map_name(f"{module}{WEIGHT}")  # patterns are of whole names
            if name is None:
                continue
            if not name.endswith(WEIGHT):  # gpt-oss renames an expert's weight whole
                name = hf_to_vllm_mapper.map_name(f"{module}{PACKED_WEIGHT}")
            names[module] = name.removesuffix(WEIGHT).removesuffix(PACKED_WEIGHT)
        layouts, tied = self.checkpoint.modules, self.checkpoint.tied
        self.checkpoint = dataclasses.replace(
            self.checkpoint,
            modules={new: layouts[old] for old, new in names.items() if old in layouts},
            tied={
                new: names[tied[old]]
                for old, new in names.items()
                if old in tied and tied[old] in names
            },
        )

    def packed_module(self, prefix: str) -> PackedModule | None:
        """How the layer `prefix` is stored; None if it is not packed.

        Raises ServingError if vLLM fuses it from shards that are not stored alike.
        """
        return find_packed_module(self.checkpoint, self.packed_modules_mapping, prefix)

    def get_checkpoint_weight_mapper(self) -> Any:  # type: ignore[override]
        """vLLM's own, and names for experts that its gpt-oss would not hand to our parameters.

        It is asked for when all layers are made and before any weight is loaded.

        Raises ServingError for a packed output head that no layer of the model takes, and for
        patterns that match no module of a checkpoint which is quantized while it is loaded.
        """
        if self.quantizer is not None:
            self.quantizer.check_used()
            return super().get_checkpoint_weight_mapper() | self.quantizer.expert_names()
        heads = self._packed_heads()
        if heads and self.head_expected:
            raise ServingError(
                f"{heads[0]} is packed, but vLLM computes this model's logits with its embeddings "
                "or with an unquantized head; quantize the model again without --head"
            )
        return super().get_checkpoint_weight_mapper() | expert_names(self.checkpoint)

    def _check_model(self) -> None:
        """Raise ServingError for options that do not go with a packed checkpoint, and for a model
        that vLLM would serve wrong.
        """
        from vllm_precalib.backends import RECIPE_KEYS, Options

        if self.architectures is not None:
            return
        config = get_current_vllm_config()
        model = config.model_config
        recipes = Options.parse(config.additional_config).recipes
        if given := next((k for k in RECIPE_KEYS if getattr(recipes, k)), None):
            raise ServingError(
                f'additional_config: "{given}" is for an ordinary checkpoint, but this one is '
                "already packed; leave it out"
            )
        self.architectures = set()
        if model is None:
            return
        if self.head_expected is None:
            whole = config.parallel_config.pipeline_parallel_size == 1
            self.head_expected = whole and model.runner_type == "generate"
        configs = (model.hf_config.to_dict(), model.hf_text_config.to_dict())
        self.architectures = families.architectures_of(*configs)
        if reason := families.refused(self.architectures):
            raise ServingError(f"{reason}, which it cannot do with packed ones; serve the original")

    def _check_modules(self, modules: Iterable[str]) -> None:
        """Raise ServingError for a packed module whose weight vLLM's loader would change."""
        for module in modules:
            if what := families.rewritten(self.architectures or (), module):
                raise ServingError(f"{module} is packed, but vLLM {what}; quantize the model again")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for the layer `prefix`; None where vLLM's own default is right.

        Raises ServingError for experts that are not stored alike, and for a --load-format that
        brings no checkpoint.
        """
        # imported here so that a vLLM without these names can still serve other models
        from vllm_precalib import linear_method as methods
        from vllm_precalib.online_quantizer import OnlineQuantizer
        from vllm_precalib.undecided_linear_method import UndecidedLinearMethod

        kind = methods.layer_kind(layer)
        if kind == "linear":
            _check_load_format(get_current_vllm_config().load_config.load_format)
        if not self.packed:
            if self.quantizer is None:
                self.quantizer = OnlineQuantizer(self.registry, self.choices)
            return self.quantizer.method(kind, layer, prefix, self.packed_modules_mapping)
        if kind:
            self._check_model()
        if kind == "experts":
            from vllm_precalib.experts.choice import experts_method

            return experts_method(self.checkpoint, layer, prefix, self.registry, self.choices)
        head = prefix.removeprefix(".")  # StableLM calls it ".lm_head"
        if kind == "head" and head in self.checkpoint.tied:
            from vllm_precalib.tied_head import TiedHeadMethod

            return TiedHeadMethod(head, self.checkpoint.tied[head])
        if kind == "embedding" and not prefix:  # some models do not tell
            prefix = self._packed_embeddings() or ""
        module = self.packed_module(prefix) if kind else None
        if module is None and kind == "head" and len(self._packed_heads()) == 1:
            module = self.packed_module(self._packed_heads()[0])  # StableLM calls it ".lm_head"
        if module is None and kind == "linear":
            return UndecidedLinearMethod(prefix, self.checkpoint, self.registry, self.choices)
        if module is None:
            return None
        self._check_modules(module.shards)
        if kind == "head":
            self.head_expected = False
        rows = kind == "embedding"
        return methods.PrecalibLinearMethod(prefix, module, self.registry, self.choices, rows)

    def _packed_heads(self) -> list[str]:
        return [module for module in self.checkpoint.modules if HEAD.search(module)]

    def _packed_embeddings(self) -> str | None:
        """The one packed module that is the input embeddings by its name, if there is one."""
        found = [name for name in self.checkpoint.modules if name.endswith("embed_tokens")]
        return found[0] if len(found) == 1 else None


def _check_load_format(load_format: Any) -> None:
    if load_format in PROCESSED:
        raise ServingError(
            f"--load-format {load_format} brings weights in the form that a backend gave them on "
            "another machine, which precalib does not read; leave out --load-format"
        )


def register_config() -> None:
    """Make vLLM know `PrecalibConfig`; doing it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(PrecalibConfig)
