"""llm-compressor's methods: min-max grids without data, and GPTQ and AWQ with data.

Asymmetric grids, one float16 scale and one zero point of as many bits as a code per group. Group
sizes are divisors of the input sizes, for llm-compressor has no ragged groups.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from calibration_text import WINDOW, evenly_spread
from torch import Tensor

Found = tuple[dict[str, Tensor], dict[str, int]]  # weights and stored bits, by name
FLOAT16 = 16


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A weight-only grid; windows: how many windows of text a calibrated method sees."""

    method: str
    bits: int
    group_size: int
    symmetric: bool = False
    windows: int = 128

    @property
    def variant(self) -> str:
        """Its name beside the method's."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        fewer = "" if self.windows == 128 else f", {self.windows} windows"
        return f"{self.bits} bits, g {self.group_size}, {kind}{fewer}"


CALIBRATED = ("GPTQ", "AWQ")
DATA_FREE = "llm-compressor"
SCHEMES = (
    Scheme(DATA_FREE, 4, 64),
    Scheme(DATA_FREE, 3, 64),
    Scheme(DATA_FREE, 4, 64, symmetric=True),
    Scheme("GPTQ", 4, 64),
    Scheme("GPTQ", 3, 64),
    Scheme("GPTQ", 5, 64),
    Scheme("GPTQ", 4, 64, windows=32),
    Scheme("GPTQ", 3, 64, windows=32),
    Scheme("GPTQ", 5, 64, windows=32),
    Scheme("AWQ", 4, 64),
    Scheme("AWQ", 3, 64),
    Scheme("AWQ", 5, 64),
    Scheme("AWQ", 4, 64, windows=32),
    Scheme("AWQ", 3, 64, windows=32),
    Scheme("AWQ", 5, 64, windows=32),
    Scheme("AWQ", 4, 64, windows=8),
    Scheme("AWQ", 3, 64, windows=8),
    Scheme("AWQ", 5, 64, windows=8),
)


def make(scheme: Scheme, source: Path, calibration: Path | None) -> Found:
    """Quantize a model: its changed parameters by name, and the bits stored for each weight."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = {name: values.clone() for name, values in model.named_parameters()}
    options: dict[str, Any] = {}
    if calibration:
        tokenizer = AutoTokenizer.from_pretrained(source)
        windows = calibration_windows(tokenizer, calibration.read_text(), scheme.windows)
        options = {
            "dataset": windows,
            "num_calibration_samples": len(windows),
            "max_seq_length": WINDOW,
            "shuffle_calibration_samples": False,
            "batch_size": 8,
        }
    with no_pinning():
        oneshot(model=model, recipe=recipe(scheme), **options)
    return changed(model, before)


@contextlib.contextmanager
def no_pinning() -> Iterator[None]:
    """AWQ pins its activations in memory, which torch refuses on a machine without a GPU."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    with mock.patch.object(IntermediatesCache, "pin_memory", return_value=None):
        yield


def recipe(scheme: Scheme) -> list[Any]:
    """The modifiers of a method."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        strategy="group",
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    options = {"config_groups": groups, "ignore": ["lm_head"]}
    if scheme.method == "GPTQ":
        return [quick_gptq()(**options)]
    if scheme.method == "AWQ":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**options)]
    return [QuantizationModifier(**options)]


def quick_gptq() -> type:
    """GPTQ with the same Hessians in less time on a CPU.

    Layers with one input share their product, and inputs, which are bfloat16 already, are
    multiplied as such with sums in float32.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from pydantic import PrivateAttr

    class QuickGPTQModifier(GPTQModifier):
        _last: tuple[Any, ...] = PrivateAttr(default=(None, None))

        def calibrate_module(self, module: Any, args: Any, _output: Any) -> None:
            inputs = args[0]
            if self._last[0] is not inputs:
                rows = inputs.reshape(-1, inputs.shape[-1]).float()
                torch.set_float32_matmul_precision("medium")
                self._last = (inputs, 2 * (rows.T @ rows))
                torch.set_float32_matmul_precision("highest")
            if module not in self._num_samples:
                self._hessians[module] = torch.zeros_like(self._last[1])
                self._num_samples[module] = torch.zeros(())
            self._hessians[module] += self._last[1]
            self._num_samples[module] += len(inputs)

        def on_sequential_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
            self._last = (None, None)
            return super().on_sequential_epoch_end(*args, **kwargs)

    return QuickGPTQModifier


def calibration_windows(tokenizer: Any, text: str, count: int) -> Any:
    """So many windows of 512 tokens, evenly spread over the text, as a data set."""
    from datasets import Dataset

    rows = evenly_spread(tokenizer, text, count)
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * WINDOW] * len(rows)})


def same_norm(values: Tensor, before: Tensor) -> bool:
    """Whether a parameter is unchanged, or only rounded.

    llm-compressor turns norms that multiply by 1 + w (Gemma) into plain ones and back, in the
    parameter's type. That rounding is no part of the methods; the original values are better.
    """
    there_and_back = ((1 + before.float()).to(before.dtype).float() - 1).to(before.dtype)
    return torch.equal(values, before) or torch.equal(values, there_and_back)


@torch.no_grad()
def changed(model: Any, before: Mapping[str, Tensor]) -> Found:
    """What differs from the original, with weights as their codes stand for them."""
    from compressed_tensors.quantization import fake_quantize

    found, bits = {}, {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        grid = {"scale": module.weight_scale, "zero_point": module.weight_zero_point}
        weight = module.weight
        found[f"{name}.weight"] = fake_quantize(x=weight, args=scheme.weights, **grid)
        each = FLOAT16 + (0 if scheme.weights.symmetric else scheme.weights.num_bits)
        bits[f"{name}.weight"] = (
            weight.numel() * scheme.weights.num_bits + module.weight_scale.numel() * each
        )
    for name, values in model.named_parameters():
        if name in before and name not in found and not same_norm(values, before[name]):
            found[name] = values
    return {name: values.detach().contiguous() for name, values in found.items()}, bits
