"""What the vLLM plugin makes of a packed checkpoint, layer by layer, without an engine.

As in an engine, the layers and their sizes come from the model, here always those of
`hostile.packed_files`, and the tensors are those that the safetensors library reads.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from hostile import COLUMNS, RECIPES, ROWS, SHARDS, module
from safetensors import SafetensorError, safe_open
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from precalib_kernels.errors import FormatError
from precalib_kernels.format.reference import dequantize
from vllm_precalib.config import PrecalibConfig

EYE = torch.eye(COLUMNS)


@contextlib.contextmanager
def one_rank(backend: str | None = None) -> Iterator[None]:
    """Layers are built as on one rank, by the default backend or another."""
    options = {"precalib": {"backend": backend}} if backend else {}
    with contextlib.ExitStack() as stack:
        for place in ("layers.linear", "parameter"):
            path = f"vllm.model_executor.{place}.get_tensor_model_parallel"
            stack.enter_context(mock.patch(f"{path}_rank", return_value=0))
            stack.enter_context(mock.patch(f"{path}_world_size", return_value=1))
        stack.enter_context(set_current_vllm_config(VllmConfig(additional_config=options)))
        yield


def use_plugin(root: Path) -> str:
    """Build, load and multiply by every layer that config.json says is packed.

    A product is held against the reference on the same tensors, so that none is served wrong.
    """
    if not (root / "config.json").is_file():
        raise FormatError("vLLM stops before the plugin is asked: no configuration, or endless")
    try:
        config = json.loads((root / "config.json").read_bytes())["quantization_config"]
        stored = dict(_tensors(root))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"vLLM stops before the plugin is asked: {error!r:.200}") from error
    if not isinstance(config, dict) or config.get("quant_method") != "precalib":
        raise FormatError("vLLM does not take it for a packed checkpoint")
    parsed = PrecalibConfig.from_config(config)
    used = 0
    for layer in range(len(RECIPES)):
        name = module(layer)
        packed = parsed.packed_module(name)
        if packed is None:
            continue
        linear = ReplicatedLinear(
            COLUMNS, ROWS, bias=False, params_dtype=torch.float32, quant_config=parsed, prefix=name
        )
        tensors: dict[str, Tensor] = {}
        for suffix in packed.layout.tensors(ROWS, COLUMNS):
            if f"{name}.{suffix}" in stored:
                parameter = linear.get_parameter(suffix)
                tensors[suffix] = stored[f"{name}.{suffix}"]
                parameter.weight_loader(parameter, tensors[suffix].clone())
        linear.quant_method.process_weights_after_loading(linear)
        weight = dequantize(tensors, packed.layout, COLUMNS, where=name)
        product = linear.quant_method.apply(linear, EYE).T
        close = torch.allclose(product, weight, rtol=1e-2, atol=1e-2 * float(weight.abs().max()))
        assert close, f"{name} is served wrong"
        used += 1
    return "serves" if used else "nothing packed"


def _tensors(root: Path) -> Iterator[tuple[str, Tensor]]:
    for shard in SHARDS:
        if not (root / shard).is_file():
            raise FileNotFoundError(shard)
        with safe_open(root / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)
