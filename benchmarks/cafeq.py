"""CafeQ's transform and rounding of value–output pairs (arXiv 2511.19705): KL without and with.

    python benchmarks/cafeq.py SOURCE --text FILE --work DIR

measures each variant of VARIANTS with each recipe of RECIPES_USED: KL of the whole model quantized,
KL with only v and o quantized, and errors of the products W_o·W_v. Learned matrices and results are
kept in DIR, so it goes on where it was broken off. --table prints the tables of all results in DIR.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from quality import decoder_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.kl import compare, reference_distributions, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.method.encode import encode_unchecked
from offline_quantize.method.pair_rounding import product_error, round_pair, unpacked
from offline_quantize.method.recipes import RECIPES
from offline_quantize.method.value_output import transform_output, transform_value
from offline_quantize.method.value_output_learning import STEPS, MatrixKind, learn
from offline_quantize.method.value_output_proxies import ExpectedError, LogSumExp, Proxy
from precalib_kernels.errors import SourceError

RECIPES_USED = ("balanced-3", "rtn-3", "balanced-4", "rtn-4")
GROUP = 128
# name -> (transform, whether the pair is rounded alternately)
VARIANTS: Mapping[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "random rotation": ("random", False),
    "LogSumExp, orthogonal": ("LogSumExp, orthogonal", False),
    "LogSumExp, invertible": ("LogSumExp, invertible", False),
    "expected error, orthogonal": ("expected error, orthogonal", False),
    "expected error, invertible": ("expected error, invertible", False),
    "alternating rounding": (None, True),
    "LogSumExp, invertible, alternating rounding": ("LogSumExp, invertible", True),
}


class Pairs:
    """W_v and W_o of every layer, and the matrices learned for them."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, folder: Path, steps: int) -> None:
        self.weights, self.heads, self.folder, self.steps = weights, heads, folder, steps
        self.names = {
            name: name.replace(".v_proj.", ".o_proj.") for name in weights if ".v_proj." in name
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for value, output in self.names.items():
            yield value, self.weights[value].float(), self.weights[output].float()

    def matrices(self, transform: str, recipe: str) -> dict[str, Tensor]:
        """Matrices of a transform, by the name of W_v; learned once and kept.

        Those for the expected error at 3 bits serve 4 bits of the same family too.
        """
        if transform == "random":
            return {name: self._random(i, name) for i, name in enumerate(self.names)}
        measure, _, kind = transform.partition(", ")
        if measure == "expected error":
            measure += " of " + recipe.replace("4", "3")
        path = self.folder / f"{measure}.safetensors"
        if not path.exists():
            self._learn(measure, path)
        return {
            name: matrices
            for key, matrices in load_file(path).items()
            for name, _, found in [key.partition(" ")]
            if found == kind
        }

    def _random(self, seed: int, name: str) -> Tensor:
        size = len(self.weights[name]) // self.heads
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(self.heads, size, size, generator=generator)).Q

    def _learn(self, measure: str, path: Path) -> None:
        found: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"before": [], "orthogonal": [], "invertible": []}
        seconds: dict[MatrixKind, float] = {"orthogonal": 0.0, "invertible": 0.0}
        for name, value, output in self:
            proxy = self._proxy(measure, value, output)
            rotation = None
            for kind in seconds:
                start = time.perf_counter()
                learned = learn(
                    value, output, self.heads, proxy, kind, self.steps, rotation=rotation
                )
                rotation = rotation or learned
                seconds[kind] += time.perf_counter() - start
                found[f"{name} {kind}"] = learned.matrices
                facts[kind].append(learned.after)
            facts["before"].append(learned.before)
            print(measure, name, *(f"{facts[key][-1]:.3f}" for key in facts), flush=True)
        save_file(found, path)
        write_json(path.with_suffix(".json"), facts | {"seconds": seconds, "steps": self.steps})

    def _proxy(self, measure: str, value: Tensor, output: Tensor) -> Proxy:
        if measure == "LogSumExp":
            return LogSumExp.of(value, output, GROUP)
        recipe = RECIPES[measure.rpartition(" ")[2]]
        return ExpectedError(recipe, recipe)


class Bench:
    """A model of which weights are replaced, and what the original says on a text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        source = arguments.source
        checkpoint = open_checkpoint(source)
        self.weights = decoder_weights(checkpoint)
        heads = int(checkpoint.text_config["num_key_value_heads"])
        self.recipes = arguments.recipes
        self.folder = arguments.work / source.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pairs = Pairs(self.weights, heads, self.folder, arguments.steps)
        self.model: Any = load_original(source, torch.bfloat16, "cpu")
        self.parameters = dict(self.model.named_parameters())
        self.windows = text_windows(load_tokenizer(source), [arguments.text], arguments.tokens)
        self.seen = self._second_moments()
        self.reference = reference_distributions(self.model, self.windows)

    def _second_moments(self) -> dict[str, Tensor]:
        """E[x·xᵀ] of the inputs of every W_v on the text: what a data-free method cannot know."""
        sums: dict[str, Tensor] = {}
        hooks = []
        for name in self.pairs.names:

            def add(_: Any, inputs: Any, name: str = name) -> None:
                x = inputs[0].flatten(0, -2).float()
                sums[name] = sums.get(name, 0) + x.T @ x

            module = self.model.get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(add))
        with torch.inference_mode():
            for window in self.windows:
                self.model.model(window[None])
        for hook in hooks:
            hook.remove()
        return {name: total / total.diagonal().mean() for name, total in sums.items()}

    def kl(self, replaced: Mapping[str, Tensor]) -> float:
        """KL with these weights replaced; the others become the original's."""
        for name, weight in self.weights.items():
            self.parameters[name].data.copy_(replaced.get(name, weight))
        return float(compare(self.reference, self.model, self.windows).kl.double().mean())

    def run(self) -> None:
        """Measure what is not measured yet."""
        path = self.folder / "results.json"
        rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
        for recipe in self.recipes:
            others: dict[str, Tensor] = {}
            for variant in VARIANTS:
                if any((row["recipe"], row["variant"]) == (recipe, variant) for row in rows):
                    continue
                others = others or self._others(recipe)
                rows.append(self._row(recipe, variant, others))
                print(rows[-1], flush=True)
                write_json(path, {"source": self.folder.name, "rows": rows})

    def _others(self, recipe: str) -> dict[str, Tensor]:
        """All weights but v and o, quantized."""
        pairs = {*self.pairs.names, *self.pairs.names.values()}
        return {n: rounded(w.float(), recipe) for n, w in self.weights.items() if n not in pairs}

    def _row(self, recipe: str, variant: str, others: Mapping[str, Tensor]) -> dict[str, Any]:
        transform, alternating = VARIANTS[variant]
        matrices = self.pairs.matrices(transform, recipe) if transform else {}
        replaced: dict[str, Tensor] = {}
        errors: list[tuple[float, float]] = []
        start = time.perf_counter()
        for name, value, output in self.pairs:
            heads, used = self.pairs.heads, RECIPES[recipe]
            if name in matrices:
                value = transform_value(value, matrices[name])
                output = transform_output(output, matrices[name])
            if alternating:
                pair = round_pair(value, output, heads, used, used)
                both = unpacked(pair.value, value), unpacked(pair.output, output)
            else:
                both = rounded(value, recipe), rounded(output, recipe)
            isotropic = product_error((value, output), both, heads)
            errors.append((isotropic, product_error((value, output), both, heads, self.seen[name])))
            replaced[name], replaced[self.pairs.names[name]] = both
        seconds = time.perf_counter() - start
        mean = torch.tensor(errors).mean(0).tolist()
        return {
            "recipe": recipe,
            "variant": variant,
            "kl": self.kl({**others, **replaced}),
            "kl_pair": self.kl(replaced),
            "product_error": mean[0],
            "product_error_real_inputs": mean[1],
            "seconds": seconds,
        }


def rounded(weight: Tensor, recipe: str) -> Tensor:
    """A weight through the encoder and back."""
    return unpacked(encode_unchecked(weight, RECIPES[recipe], "weight"), weight)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=STEPS, help="of learning, for each kind")
    parser.add_argument("--recipes", nargs="+", default=RECIPES_USED)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    Bench(arguments).run()


if __name__ == "__main__":
    main()
