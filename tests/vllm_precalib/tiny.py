"""Tiny packed checkpoints from random but valid packed tensors: only the format, no quantizer.

Next to every packed checkpoint lies the same model unpacked by the reference, for transformers.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.reference import dequantize
from precalib_kernels.format.salient_index import pack_salient

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
WEIGHT_SIZE = 0.1  # root mean square; large enough for logits to differ


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """packed: directory vLLM serves; dense: the same weights, as an ordinary checkpoint."""

    packed: Path
    dense: Path


def random_packed(layout: Layout, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Valid packed tensors of a weight [rows, columns], with every code in use."""
    make = torch.Generator().manual_seed(seed)
    groups, count = layout.groups(columns), layout.salient_count

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=make, dtype=torch.uint8)

    def floats(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=make)).half()

    values = {
        "qweight": lambda: pack_bits(integers(2**layout.bits, rows, columns), layout.bits),
        "scales": lambda: (
            integers(64, rows, groups) if layout.scale == "log8" else floats(0.5, 1, rows, groups)
        ),
        "row_scale": lambda: floats(0.5, 1, rows, 1),
        "zeros": lambda: integers(2**layout.bits, rows, groups),
        "salient": lambda: pack_salient(
            _random_positions(layout, rows, columns, make),
            integers(2 ** (layout.salient_bits - layout.bits), rows, groups, count),
            layout,
        ),
        "salient_scale": lambda: floats(0.01, 0.02, rows, 1),
        "salient_offset": lambda: floats(1, 2, rows, 1),
        "column_scale": lambda: floats(0.5, 1.5, 1, columns),
    }
    tensors = {name: values[name]() for name in layout.tensors(rows, columns)}
    layout.check(tensors, columns, "test")
    size = dequantize(tensors, layout, columns).square().mean().sqrt()
    scaled = ["row_scale"] if layout.scale == "log8" else ["scales"]
    for name in (*scaled, "salient_scale", "salient_offset"):
        if name in tensors:
            tensors[name] = (tensors[name].float() * WEIGHT_SIZE / size).half()
    return tensors


def _random_positions(layout: Layout, rows: int, columns: int, make: torch.Generator) -> Tensor:
    groups, group, count = layout.groups(columns), layout.group_size, layout.salient_count
    draw = torch.rand(rows, groups, group, generator=make)
    draw[:, -1, columns - (groups - 1) * group :] = 2  # not in the ragged group
    chosen = draw.argsort(-1)[..., :count]
    used = torch.randint(count + 1, (rows, groups, 1), generator=make)
    chosen = torch.where(torch.arange(count) < used, chosen, group).sort(-1).values
    return torch.where(chosen < group, chosen, -1)


def model_config(kind: str, **changes: Any) -> transformers.PreTrainedConfig:
    """A two-layer model with grouped-query attention; sizes leave ragged groups."""
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "phi3": transformers.Phi3Config,
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
    """Write a random model whose linear `module` is packed as LAYOUTS[layout_of(module)].

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
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    dense = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del dense["lm_head.weight"]
    for index, (name, tensor) in enumerate(dense.items()):
        module = name.removesuffix(".weight")
        layout_name = layout_of(module) if module in linears else None
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
    packed_config = CheckpointConfig("test", used, modules, kept).to_dict()
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
    architectures = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "phi3": "Phi3ForCausalLM",
    }
    fields = {
        **config.to_dict(),
        "architectures": [architectures[config.model_type]],
        "dtype": str(dtype).removeprefix("torch."),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(fields))
