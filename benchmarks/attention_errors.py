"""What quantizing v and o does to the output of each attention block, and which part of it stays.

    python benchmarks/attention_errors.py SOURCE --text FILE --work DIR --recipes RECIPE ...

Blocks get the inputs that they have in the original model. Prints, for each variant that
`cafeq.py` has learned matrices for in DIR: the relative squared error of W_o·W_v, that of the
block's output, and the share of the latter that all tokens have in common. Means over layers.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from cafeq import VARIANTS, Pairs, rounded
from quality import decoder_weights
from torch import Tensor

from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.kl import WINDOW, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.method.pair_rounding import product_error, round_pair, unpacked
from offline_quantize.method.recipes import RECIPES
from offline_quantize.method.value_output import transform_output, transform_value

SHOWN = (
    "none",
    "LogSumExp, orthogonal",
    "expected error, orthogonal",
    "expected error, invertible",
    "alternating rounding",
)


class Blocks:
    """The attention blocks of a model and their inputs on one window of a text."""

    def __init__(self, model: Any, names: list[str], window: Tensor) -> None:
        self.blocks = {name: model.get_submodule(name.rpartition(".v_proj")[0]) for name in names}
        self.inputs: dict[str, tuple[Any, dict[str, Any]]] = {}
        hooks = []
        for name, block in self.blocks.items():

            def record(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                self.inputs[name] = args, dict(kwargs)

            hooks.append(block.register_forward_pre_hook(record, with_kwargs=True))
        with torch.inference_mode():
            model(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()

    def output(self, name: str) -> Tensor:
        """Output [tokens, hidden] of the block that W_v of this name lies in."""
        args, kwargs = self.inputs[name]
        with torch.inference_mode():
            found: Tensor = self.blocks[name](*args, **kwargs)[0][0].float()
        return found


def measure(
    arguments: argparse.Namespace, recipe: str, variant: str, state: tuple[Any, Pairs, Any, Any]
) -> None:
    """Print the means of one variant."""
    blocks, pairs, parameters, original = state
    transform, alternating = VARIANTS[variant]
    matrices = pairs.matrices(transform, recipe) if transform else {}
    used, measures = RECIPES[recipe], []
    for name, value, output in pairs:
        if name in matrices:
            value = transform_value(value, matrices[name])
            output = transform_output(output, matrices[name])
        if alternating:
            pair = round_pair(value, output, pairs.heads, used, used)
            both = unpacked(pair.value, value), unpacked(pair.output, output)
        else:
            both = rounded(value, recipe), rounded(output, recipe)
        for weight, found in zip((name, pairs.names[name]), both, strict=True):
            parameters[weight].data.copy_(found)
        error = blocks.output(name) - original[name]
        squares = float(error.square().sum())
        measures.append(
            (
                product_error((value, output), both, pairs.heads),
                squares / float(original[name].square().sum()),
                float(error.mean(0).square().sum()) * len(error) / squares,
            )
        )
    means = (statistics.mean(column) for column in zip(*measures, strict=True))
    figures = " | ".join(f"{mean:.4f}" for mean in means)
    print(f"| {arguments.source.name}, `{recipe}`, {variant} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of cafeq.py's results")
    parser.add_argument("--recipes", nargs="+", default=["balanced-3", "rtn-3"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=SHOWN)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    checkpoint = open_checkpoint(arguments.source)
    weights = decoder_weights(checkpoint)
    heads = int(checkpoint.text_config["num_key_value_heads"])
    pairs = Pairs(weights, heads, arguments.work / arguments.source.name, steps=0)
    model: Any = load_original(arguments.source, torch.bfloat16, "cpu")
    window = text_windows(load_tokenizer(arguments.source), [arguments.text], WINDOW)[0]
    blocks = Blocks(model, list(pairs.names), window)
    original = {name: blocks.output(name) for name in pairs.names}
    state = blocks, pairs, dict(model.named_parameters()), original
    print("| | product | block | in common |\n|---|--:|--:|--:|")
    for recipe in arguments.recipes:
        for variant in arguments.variants:
            measure(arguments, recipe, variant, state)


if __name__ == "__main__":
    main()
