"""What the arithmetic of the CPU kernels adds to a packed model's distance from its original.

    python benchmarks/cpu_accuracy.py PACKED ORIGINAL --text FILE [--tokens 8192]

KL divergence per token and perplexity on a text, with linear layers computed three ways: weights
dequantized to bfloat16 and torch's product, as `precalib eval` has it; backend `x86`; the same
with `"activations": "int8"`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.evaluation.kl import compare, reference_distributions, text_windows
from offline_quantize.evaluation.models import load_original, load_packed, load_tokenizer
from precalib_kernels.backends.x86 import library, op
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.backends.x86.repack import repack


def native_product(
    checkpoint: PackedCheckpoint, module: str, int8_inputs: bool
) -> Callable[[Tensor], Tensor]:
    """The module's product by the kernels."""
    rows, columns = checkpoint.shape(module)
    plan = X86Layout(checkpoint.layout(module), columns, (rows,), int8_inputs)
    tensors = checkpoint.tensors(module)
    if "column_scale" in tensors:
        tensors["column_scale"] = tensors["column_scale"].view(1, columns)
    packed, bytes_of_plan = repack(tensors, plan, module), op.layout_tensor(plan)
    return lambda x: op.linear(x, packed, bytes_of_plan, None, rows, isa=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("original", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    if not library.supported_isas():
        parser.error("the kernels need AVX2")
    windows = text_windows(load_tokenizer(options.original), [options.text], options.tokens)
    original = load_original(options.original, torch.bfloat16, "cpu")
    reference = reference_distributions(original, windows)
    checkpoint = open_packed(options.packed)
    model = load_packed(options.packed, torch.bfloat16, "cpu")
    print(f"# {options.packed.name}, ISA {library.supported_isas()[-1]}, {len(windows)} windows")
    print("| products | KL | 95 % | perplexity |\n|---|--:|--:|--:|")
    ways = {"dense": None, "x86": False, "x86, int8": True}
    for name, int8_inputs in ways.items():
        if int8_inputs is not None:
            for module in checkpoint.config.modules:
                layer = model.get_submodule(module)
                assert layer.bias is None
                layer.forward = native_product(checkpoint, module, int8_inputs)
        found = compare(reference, model, windows).summary(options.text.name)
        low, high = found.kl_interval
        print(
            f"| {name} | {found.kl:.5f} | {low:.5f} to {high:.5f} | {found.perplexity:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
