"""Tiny packed checkpoints from random but valid packed tensors: only the format, no quantizer.

Next to every packed checkpoint lies the same model unpacked by the reference, for transformers.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_tensors
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.reference import dequantize

ROW = Layout(
    bits=4,
    group_size=64,
    codebook=(-127, -95, -74, -58, -44, -31, -19, -7, 7, 19, 31, 44, 58, 74, 95, 127),
    scale="log8",
    salient_count=2,
    salient_grid="row",
    column_scale=True,
)
SIGN = Layout(bits=3, group_size=64, salient_count=5, salient_bits=3, column_scale=True)
MIN_MAX = Layout(bits=4, group_size=32, salient_count=3, salient_grid="min-max")
PLAIN = Layout(bits=2, group_size=32)
TRELLIS = Layout(
    bits=3, group_size=64, codebook=ROW.codebook, trellis=True, scale="log8", column_scale=True
)
LAYOUTS = {"row": ROW, "sign": SIGN, "min-max": MIN_MAX, "plain": PLAIN, "trellis": TRELLIS}
LAYOUTS |= {name: packed_tensors.RECIPE_LAYOUTS[name] for name in ("balanced-2", "balanced-3")}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}
WEIGHT_SIZE = 0.1  # root mean square; large enough for logits to differ


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """packed: directory vLLM serves; dense: the same weights, as an ordinary checkpoint."""

    packed: Path
    dense: Path


def random_packed(layout: Layout, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Valid packed tensors of a weight [rows, columns] of WEIGHT_SIZE, with every code in use.

    Salient weights are larger than the others, and both matter.
    """
    ranges = {
        **dict.fromkeys(("scales", "row_scale"), (0.5, 1.0)),
        "salient_scale": (0.01, 0.02),
        "salient_offset": (1.0, 2.0),
        "column_scale": (0.5, 1.5),
    }
    tensors = packed_tensors.random_packed(layout, rows, columns, seed, 64, ranges).tensors
    layout.check(tensors, columns, "test")
    size = dequantize(tensors, layout, columns).square().mean().sqrt()
    scaled = ["row_scale"] if layout.scale == "log8" else ["scales"]
    for name in (*scaled, "salient_scale", "salient_offset"):
        if name in tensors:
            tensors[name] = (tensors[name].float() * WEIGHT_SIZE / size).half()
    return tensors


def model_config(kind: str, **changes: Any) -> transformers.PreTrainedConfig:
    """A two-layer model with grouped-query attention; sizes leave ragged groups."""
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "phi3": transformers.Phi3Config,
        "stablelm": transformers.StableLmConfig,
        "llama4": transformers.Llama4TextConfig,
    }
    sizes = {
        "vocab_size": 200,
        "hidden_size": 160,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return classes[kind](**{**sizes, **changes})


def build(
    folder: Path,
    config: transformers.PreTrainedConfig,
    layout_of: Callable[[str], str | None],
    seed: int = 0,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Write a random model whose `module` is packed as LAYOUTS[layout_of(module)].

    Modules are linear layers and embeddings; a head tied to packed embeddings uses theirs.

    edit: spoils the packed tensors before they are written.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            parameter.data *= 5  # answers far from uniform
    stored: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    kinds = {name: type(module) for name, module in model.named_modules()}
    linears = {name for name, kind in kinds.items() if kind is torch.nn.Linear}
    packable = linears | {"model.embed_tokens"}
    dense = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del dense["lm_head.weight"]
    for index, (name, tensor) in enumerate(dense.items()):
        module = name.removesuffix(".weight")
        layout_name = layout_of(module) if module in packable else None
        if layout_name is None:
            stored[name] = tensor.to(dtype)
            continue
        layout = LAYOUTS[layout_name]
        tensors = random_packed(layout, *tensor.shape, seed=1000 * seed + index)
        stored |= {f"{module}.{suffix}": packed for suffix, packed in tensors.items()}
        modules[module] = layout_name
        dense[name] = dequantize(tensors, layout, tensor.shape[1]).contiguous()
    if edit:
        edit(stored)
    used = {name: LAYOUTS[name] for name in set(modules.values())}
    kept = tuple(sorted(linears - set(modules)))
    _write(folder / "dense", config, {n: t.to(dtype) for n, t in dense.items()}, dtype)
    shared = config.tie_word_embeddings and "model.embed_tokens" in modules
    tied = {"lm_head": "model.embed_tokens"} if shared else {}
    packed_config = CheckpointConfig("test", used, modules, kept, tied).to_dict()
    _write(folder / "packed", config, stored, dtype, quantization_config=packed_config)
    return Checkpoint(folder / "packed", folder / "dense")


def _write(
    folder: Path,
    config: transformers.PreTrainedConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    **more: Any,
) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        **config.to_dict(),
        "architectures": [ARCHITECTURES[config.model_type]],
        "dtype": str(dtype).removeprefix("torch."),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(fields))
