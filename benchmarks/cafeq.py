"""CafeQ's transform and rounding of value–output pairs (arXiv 2511.19705): KL without and with.

    python benchmarks/cafeq.py SOURCE --text FILE --work DIR

measures each variant of VARIANTS with each recipe of RECIPES_USED: KL of the whole model quantized,
KL with only v and o quantized, and errors of the products W_o·W_v. Learned matrices and results are
kept in DIR, so it goes on where it was broken off; without --text it only prints tables. Seconds
are of one core.
"""

import argparse
import math
import os
import statistics
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
from offline_quantize.evaluation.kl import (
    ReferenceDistributions,
    compare,
    reference_distributions,
    text_windows,
)
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
KINDS: tuple[MatrixKind, ...] = ("orthogonal", "invertible")
PAIR_WINDOWS = 2  # for the KL with v and o alone
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
    "expected error, invertible, alternating rounding": ("expected error, invertible", True),
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
        found = load_file(path) if path.exists() else {}
        for name, value, output in self:
            if f"{name} {kind}" not in found:
                found |= self._learn(measure, name, value, output)
                save_file(found, path)
        return {name: found[f"{name} {kind}"] for name in self.names}

    def _random(self, seed: int, name: str) -> Tensor:
        size = len(self.weights[name]) // self.heads
        generator = torch.Generator().manual_seed(seed)
        rotation: Tensor = torch.linalg.qr(
            torch.randn(self.heads, size, size, generator=generator)
        ).Q
        return rotation

    def _learn(self, measure: str, name: str, value: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Both kinds of matrices of a pair; what learning them took goes to a JSON file."""
        proxy, rotation = self._proxy(measure, value, output), None
        facts: dict[str, Any] = {"steps": self.steps}
        found = {}
        for kind in KINDS:
            start = time.process_time()
            learned = learn(value, output, self.heads, proxy, kind, self.steps, rotation=rotation)
            rotation = rotation or learned
            facts |= {"before": learned.before, kind: learned.after}
            facts[f"{kind}, seconds"] = time.process_time() - start
            found[f"{name} {kind}"] = learned.matrices.clone()
        path = self.folder / f"{measure}.json"
        known = read_json(path, SourceError, "remove it") if path.exists() else {}
        write_json(path, known | {name: facts})
        print(measure, name, facts, flush=True)
        return found

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
        self.recipes, self.variants = arguments.recipes, arguments.variants or VARIANTS
        self.folder = arguments.work / source.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pairs = Pairs(self.weights, heads, self.folder, arguments.steps)
        self.model: Any = load_original(source, torch.bfloat16, "cpu")
        self.parameters = dict(self.model.named_parameters())
        self.windows = text_windows(load_tokenizer(source), [arguments.text], arguments.tokens)
        self.reference, self.seen = self._observe()

    def _observe(self) -> tuple[ReferenceDistributions, dict[str, Tensor]]:
        """What the original says on the text, and E[x·xᵀ] of the inputs of every W_v and W_o there:
        what a data-free method cannot know.
        """
        sums: dict[str, Tensor] = {}
        hooks = []
        for name in (*self.pairs.names, *self.pairs.names.values()):

            def add(_: Any, inputs: Any, name: str = name) -> None:
                x = inputs[0].flatten(0, -2).float()
                sums[name] = sums.get(name, 0) + x.T @ x

            module = self.model.get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(add))
        reference = reference_distributions(self.model, self.windows)
        for hook in hooks:
            hook.remove()
        return reference, {name: sum_ / sum_.diagonal().mean() for name, sum_ in sums.items()}

    def kl(self, replaced: Mapping[str, Tensor], windows: int | None = None) -> float:
        """KL on the first windows, with these weights replaced and the original's others."""
        for name, weight in self.weights.items():
            self.parameters[name].data.copy_(replaced.get(name, weight))
        chosen = self.windows[:windows]
        tokens = sum(len(window) - 1 for window in chosen)
        part = ReferenceDistributions(*(t[:tokens] for t in vars(self.reference).values()))
        return float(compare(part, self.model, chosen).kl.double().mean())

    def run(self) -> None:
        """Measure what is not measured yet."""
        path = self.folder / "results.json"
        rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
        for recipe in self.recipes:
            others: dict[str, Tensor] = {}
            for variant in self.variants:
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
        errors: list[tuple[float, float, float]] = []
        start = time.process_time()
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
            alike = product_error((value, output), both, heads)
            seen = product_error((value, output), both, heads, self.seen[name])
            alone = self._output_error(name, output, both[1], matrices.get(name))
            errors.append((alike, seen, alone))
            replaced[name], replaced[self.pairs.names[name]] = both
        seconds = time.process_time() - start
        mean = torch.tensor(errors).mean(0).tolist()
        return {
            "recipe": recipe,
            "variant": variant,
            "kl": self.kl({**others, **replaced}),
            "kl_pair": self.kl(replaced, PAIR_WINDOWS),
            "product_error": mean[0],
            "product_error_real_inputs": mean[1],
            "output_error_real_inputs": None if alternating else mean[2],
            "seconds": seconds,
        }

    def _output_error(
        self, name: str, output: Tensor, found: Tensor, matrices: Tensor | None
    ) -> float:
        """Relative squared error of W_o·z for the text's z, transformed as W_o is."""
        moments = self.seen[self.pairs.names[name]]
        if matrices is not None:
            queries = output.shape[1] // (len(matrices) * matrices.shape[1])
            whole = torch.block_diag(*matrices.repeat_interleave(queries, 0))
            moments = whole @ moments @ whole.T
        error = found - output
        return float(((error @ moments) * error).sum() / ((output @ moments) * output).sum())


def rounded(weight: Tensor, recipe: str) -> Tensor:
    """A weight through the encoder and back."""
    return unpacked(encode_unchecked(weight, RECIPES[recipe], "weight"), weight)


MEASURES = (
    "kl",
    "kl_pair",
    "product_error",
    "product_error_real_inputs",
    "output_error_real_inputs",
)


def tables(folder: Path) -> Iterator[str]:
    """What was measured on a model, and what learning took, as lines of Markdown."""
    rows = read_json(folder / "results.json", SourceError, "measure first")["rows"]
    yield f"| {folder.name} | KL | KL, v and o alone | product | product, text's x | o, text's z |"
    yield "|---|--:|--:|--:|--:|--:|"
    for recipe in RECIPES_USED:
        for row in (row for row in rows if row["recipe"] == recipe):
            figures = " | ".join(
                "–" if row.get(key) is None else f"{row[key]:.4f}" for key in MEASURES
            )
            yield f"| `{recipe}`, {row['variant']} | {figures} |"
    yield ""
    yield "| proxy, matrix | steps | before → after | seconds |"
    yield "|---|--:|--:|--:|"
    for path in sorted(folder.glob("*.json")):
        layers = list(read_json(path, SourceError, "remove it").values())
        if path.name == "results.json":
            continue
        for kind in KINDS:
            before, after, seconds = (
                statistics.mean(layer.get(key, math.nan) for layer in layers)
                for key in ("before", kind, f"{kind}, seconds")
            )
            yield (
                f"| {path.stem}, {kind} | {layers[0]['steps']} | {before:.2f} → {after:.2f} "
                f"| {seconds * len(layers):.0f} |"
            )


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=STEPS, help="of learning, for each kind")
    parser.add_argument("--recipes", nargs="+", default=RECIPES_USED)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.text:
        Bench(arguments).run()
    print("\n".join(tables(arguments.work / arguments.source.name)))


if __name__ == "__main__":
    main()
