"""Factors of a packed checkpoint's scales, learnt on text that the original writes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_quantize.calibration.activations import linear_layers
from offline_quantize.calibration.model import free_memory
from offline_quantize.calibration.scale_tuning import Factors, divergence, tune_factors
from offline_quantize.calibration.text import longest_window
from offline_quantize.checkpoint.packed import PackedCheckpoint
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.evaluation.arithmetic import default_dtype
from offline_quantize.evaluation.kl import generate_text
from offline_quantize.evaluation.models import errors_of_the_model, load_original, load_packed
from precalib_kernels.errors import SourceError, UsageError
from precalib_kernels.format import reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_OUT = 4_096  # tokens that nothing is learnt from
WINDOW = 128  # tokens; the model writes as many windows at once as there are
STEP = 512  # tokens of one step
SEED = 1  # `quantize --activations self` has 0
RATE = 8e-3  # of Adam, times 2**-bits: factors move as far as codes are coarse
LARGEST_HALF = 65504.0


def check_memory(source: Checkpoint, device: str) -> None:
    """Raise UsageError if the original and the quantized model do not fit into memory together."""
    entries = (entry for shard in source.shards.values() for entry in shard.values())
    weights = sum(entry.weights for entry in entries)
    needed, free = 2 * weights * default_dtype(device).itemsize, free_memory(device)
    if needed > free:
        raise UsageError(
            f"{source.root}: tuning takes the memory of two models, {needed / 1e9:.1f} GB and "
            f"more, and {free / 1e9:.1f} GB are free; use a machine or --device with more"
        )


def learn_factors(
    packed: PackedCheckpoint, source: Path, tokens: int, device: str, progress: Progress
) -> tuple[dict[str, Factors], float, float]:
    """Factors of the packed modules that are linear layers, and KL on held-out text before, after.

    source: folder of the original;  tokens: of the text to learn from.

    Raises SourceError when transformers cannot load or run the model or knows none of its layers,
    UsageError when the model cannot begin a text.
    """
    progress.begin("the original model")
    original = load_original(source, default_dtype(device), device)
    progress.begin("the quantized model")
    quantized = load_packed(packed.root, default_dtype(device), device)
    for model in (original, quantized):  # windows are short: plain products are faster
        model.set_attn_implementation("eager")
    shapes = {f"{module}.weight": packed.shape(module) for module in packed.config.modules}
    layers = {
        name.removesuffix(".weight"): layer
        for name, layer in linear_layers(quantized, shapes).items()
    }
    if not layers:
        raise SourceError(
            f"{packed.root}: transformers' {type(quantized).__name__} has no linear layer for any "
            "of its weights, so none can be tuned"
        )
    with errors_of_the_model(source, "it cannot be tuned"):
        progress.begin("text for the model")
        held_out, text = _text(original, tokens)
        before = _mean_divergence(original, quantized, held_out)
        layouts = {layer: packed.layout(module) for module, layer in layers.items()}
        found = tune_factors(
            original,
            quantized,
            list(layouts),
            text,
            rows_alone=[layer for layer, layout in layouts.items() if not layout.column_scale],
            batch=max(1, STEP // len(text[0])),
            rate={layer: RATE * 2.0**-layout.bits for layer, layout in layouts.items()},
            report=lambda step, steps, kl: progress.begin(f"step {step} of {steps}: KL {kl:.3g}"),
        )
        factors = {module: found[layer] for module, layer in layers.items()}
        with torch.no_grad():
            for module, layer in layers.items():
                weight = dequantized(packed, module, scaled(packed, module, factors[module]))
                quantized.get_parameter(f"{layer}.weight").copy_(weight)
        return factors, before, _mean_divergence(original, quantized, held_out)


def scaled(packed: PackedCheckpoint, module: str, factors: Factors) -> dict[str, Tensor]:
    """The packed tensors of a module, with its scales times these factors."""
    tensors = packed.tensors(module)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16:  # a scale; codes of scales are bytes
            of_columns = name == "column_scale"
            factor = factors.column if of_columns else factors.row[:, None]
            product = tensor.float() * factor.cpu()
            tensors[name] = product.clamp_(-LARGEST_HALF, LARGEST_HALF).half()
    return tensors


def dequantized(packed: PackedCheckpoint, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Ŵ [N, K], float32, of a module if it had these packed tensors."""
    return reference.dequantize(tensors, packed.layout(module), packed.shape(module)[1])


def _text(original: "PreTrainedModel", tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Windows that the model writes, to measure on and to learn from, all of one length."""
    window = min(WINDOW, longest_window(original, tokens))
    try:
        windows = generate_text(original, tokens + HELD_OUT, window, SEED)
    except UsageError as error:
        raise UsageError(
            "the model has neither bos_token_id nor eos_token_id to begin a text with, so it "
            "cannot write one to tune on"
        ) from error
    held_out = HELD_OUT // window
    return windows[:held_out], windows[held_out:]


def _mean_divergence(
    original: "PreTrainedModel", quantized: "PreTrainedModel", windows: Sequence[Tensor]
) -> float:
    text = torch.stack(list(windows)).to(quantized.device)
    batches = text.split(max(1, STEP // text.shape[1]))
    with torch.no_grad():
        found = [float(divergence(original, quantized, batch)) * len(batch) for batch in batches]
    return math.fsum(found) / len(windows)
