"""`PrecalibConfig`: which layers of a model are packed, and how."""

import dataclasses
from typing import Any

import torch

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import QUANT_METHOD, CheckpointConfig
from vllm_precalib.compat import vllm_names
from vllm_precalib.packed_module import PackedModule

with vllm_names():
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import (
        QuantizationConfig,
        QuantizeMethodBase,
    )


class PrecalibConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's quantization_config.

    It is built in the main process and pickled to the others, so it holds plain data only.
    """

    def __init__(self, checkpoint: CheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:  # vLLM passes nothing when config.json has no quantization_config
            raise ServingError(
                "--quantization precalib was given, but this checkpoint is not packed "
                "(its config.json has no quantization_config); pack it first with "
                "'precalib quantize SRC DST' and serve DST"
            )
        self.checkpoint = checkpoint

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
        modules = hf_to_vllm_mapper.apply_dict(dict(self.checkpoint.modules))
        self.checkpoint = dataclasses.replace(self.checkpoint, modules=modules)

    def packed_module(self, prefix: str) -> PackedModule | None:
        """How the layer `prefix` is stored; None if it is not packed.

        Raises ServingError if vLLM fuses it from parts that are not stored alike.
        """
        modules, layouts = self.checkpoint.modules, self.checkpoint.layouts
        if prefix in modules:
            return PackedModule(layouts[modules[prefix]], modules[prefix], (prefix,))
        parent, dot, fused = prefix.rpartition(".")
        shards = tuple(parent + dot + shard for shard in self.packed_modules_mapping.get(fused, ()))
        packed = [shard for shard in shards if shard in modules]
        if not packed:
            return None
        name = modules[packed[0]]
        if packed != list(shards) or any(layouts[modules[p]] != layouts[name] for p in shards):
            stored = ", ".join(f"{shard} ({modules.get(shard, 'kept')})" for shard in shards)
            raise ServingError(
                f"{prefix}: vLLM fuses its parts into one matrix, so they must be stored alike, "
                f"but they are not: {stored}; quantize the model again with one recipe for all "
                "of them, or --keep all of them"
            )
        return PackedModule(layouts[name], name, shards)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer; None leaves a layer that is not linear to vLLM.

        Raises ServingError for a packed layer of a kind that cannot be served.
        """
        # imported here so that a vLLM without these names can still serve other models
        from vllm_precalib.linear_method import quant_method

        return quant_method(self, layer, prefix)


def register_config() -> None:
    """Make vLLM know `PrecalibConfig`; doing it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(PrecalibConfig)
