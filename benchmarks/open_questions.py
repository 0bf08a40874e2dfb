"""Questions that statistical pre-calibration (arXiv 2501.09107) leaves open, by measurement.

    python benchmarks/open_questions.py SOURCE --text FILE

measures what open-questions.json does not have yet, a row at a time, and makes plots and tables of
the rows of all models there. Rows that need E[x²] or a Fisher diagonal take them from text that the
model writes itself.

--only WORD ... measures the rows whose question, method or variant contains a word, and with no
word none of them.
--plot-only makes plots and tables without a model.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from input_moments import Moments, moments
from methods import Method, Quantize, each
from open_questions_plots import plots
from open_questions_table import tables
from quality import Bench, through_the_format
from quality_report import insert_table
from salience_rules import (
    Score,
    magnitude,
    original_magnitude,
    quantize_by_score,
    weighted_magnitude,
)
from torch import Tensor
from weight_shapes import best_shares

from offline_quantize import dequantize_weight, list_recipes
from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.command import OriginalModel, Request
from offline_quantize.evaluation.kl import WINDOW
from offline_quantize.method.encode import encode
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import Recipe, adjust, for_head
from precalib_kernels.errors import PrecalibError, SourceError

SHARES = (0.03, 0.05, 0.08, 0.15)  # the paper looks at 3 to 15 %
COUNTS = (1, 2, 4, 10, 19)  # of 128: .8 to 15 %
KEY = ("model", "question", "method", "variant")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A row to measure.

    question: "alpha", "rules" or "inputs".
    share:    of salient weights that the rule aims at.
    make:     the method's function, given the bench's statistics.
    """

    question: str
    method: str
    variant: str
    share: float
    make: Callable[["Statistics"], Quantize]

    def key(self, model: str) -> tuple[str, ...]:
        """What tells the row from others."""
        return model, self.question, self.method, self.variant


class Statistics:
    """Moments of a model's inputs, computed when they are first asked for."""

    def __init__(self, source: Path, bench: Bench, tokens: int) -> None:
        self.source, self.bench, self.tokens = source, bench, tokens

    @functools.cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Over text that the original model writes."""
        request = Request(self_generated=True, tokens=self.tokens)
        original = OriginalModel(open_checkpoint(self.source), request)
        windows = original.generated_text(WINDOW)
        return moments(original.model, self.bench.weights, windows)


def main() -> None:
    """Measure what is missing; then plots and tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--self-tokens", type=int, default=2048, help="that the model writes")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="output folder"
    )
    parser.add_argument("--only", nargs="*", metavar="WORD")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    path = arguments.out / "open-questions.json"
    try:
        rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
        if not arguments.plot_only:
            if arguments.source is None or arguments.text is None:
                parser.error("give SOURCE and --text, or --plot-only")
            measure(arguments, rows, lambda: write_json(path, {"rows": rows}))
    except PrecalibError as error:
        sys.exit(f"open_questions: {error}")
    insert_table(tables(rows), arguments.out / "open-questions.md")
    plots(rows, arguments.out)


def measure(arguments: argparse.Namespace, rows: list[Row], save: Callable[[], None]) -> None:
    """Append the rows that are missing, each saved at once."""
    model, text = arguments.source.name, arguments.text.stem
    known = {tuple(row.get(name) for name in KEY) for row in rows}

    def wanted(*names: str) -> bool:
        words = arguments.only
        return words is None or any(word in " ".join(names) for word in words)

    missing = [
        case
        for case in cases()
        if case.key(model) not in known and wanted(case.question, case.method, case.variant)
    ]
    shapes = wanted("shape") and not any(
        (row["model"], row["question"]) == (model, "shape") for row in rows
    )
    if not missing and not shapes:
        return
    request = Request(text=[arguments.text], tokens=arguments.tokens)
    bench = Bench(arguments.source, request)
    statistics = Statistics(arguments.source, bench, arguments.self_tokens)
    for case in missing:
        method = Method(case.method, case.variant, case.make(statistics))
        found = bench.row(method, [text])
        measured = found["texts"][text]
        row = {**dict(zip(KEY, case.key(model), strict=True)), "share": case.share}
        row |= {"text": text, "bits": found["bits"], **measured}
        rows.append(row)
        save()
        print(f"{case.key(model)}: {row['bits']:.3f} bits, KL {row['kl']:.4f}", flush=True)
    if shapes:
        for facts in best_shares(bench.weights, statistics.moments):
            rows.append({"model": model, "question": "shape", **facts})
        save()


def cases() -> Iterator[Case]:
    """All rows that every model gets."""
    known = list_recipes()
    for name in ("paper-3", "paper-4"):
        for share in SHARES:
            yield _alpha(name, adjust(known[name], alpha=share))
    for name in ("balanced-3", "balanced-4"):
        for count in COUNTS:
            yield _alpha(name, adjust(known[name], alpha=count / 128))
    for name in ("balanced-2", "balanced-3"):  # balanced-2 is of no use without inputs
        for count in COUNTS:
            yield _alpha(name, adjust(known[name], alpha=count / 128), with_inputs=True)
    yield from rules(known["balanced-3"])
    yield from inputs(known["balanced-3"])


def rules(recipe: Recipe) -> Iterator[Case]:
    """Salience by other scores, in one layout, so at equal bits."""
    scores: dict[str, Callable[[Moments], Score]] = {
        "|w| / column scale": lambda _: magnitude,
        "|w|": lambda _: original_magnitude,
        "|w|·√E[x²]": lambda m: weighted_magnitude(m.inputs.mean_square),
        "|w|·√Fisher": lambda m: weighted_magnitude(m.fisher),
    }
    for variant, score in scores.items():
        for per_tensor in (False, True):
            where = "one threshold per tensor" if per_tensor else "largest of each group"

            def make(
                statistics: Statistics,
                score: Callable[[Moments], Score] = score,
                per_tensor: bool = per_tensor,
            ) -> Quantize:
                return _named(
                    lambda weight, m: quantize_by_score(weight, recipe, score(m), per_tensor),
                    statistics,
                )

            yield Case("rules", where, variant, recipe.alpha, make)


def inputs(recipe: Recipe) -> Iterator[Case]:
    """What is assumed of the inputs: X·Xᵀ = b·I, a diagonal, the full matrix."""
    plain = for_head("balanced-3")[1]
    yield Case("inputs", "X·Xᵀ = b·I", "no column scale", recipe.alpha, lambda _: _each(plain))
    yield Case("inputs", "X·Xᵀ = b·I", "column scale", recipe.alpha, lambda _: _each(recipe))

    def searched(weight: Tensor, m: Moments) -> tuple[Tensor, int]:
        cost = m.inputs.mean_square
        return quantize_by_score(weight, recipe, magnitude, error_cost=cost)

    def scaled(weight: Tensor, m: Moments) -> tuple[Tensor, int]:
        return _encoded(weight, recipe, m.inputs)

    def both(weight: Tensor, m: Moments) -> tuple[Tensor, int]:
        cost = m.inputs.mean_square
        return quantize_by_score(weight, recipe, magnitude, inputs=m.inputs, error_cost=cost)

    def fed_back(weight: Tensor, m: Moments) -> tuple[Tensor, int]:
        return _encoded(weight, recipe, InputStatistics(m.inputs.mean_square, m.hessian))

    diagonal = "X·Xᵀ = diag(E[x²])"
    for method, variant, function in (
        (diagonal, "in the trellis search", searched),
        (diagonal, "in the column scale", scaled),
        (diagonal, "in both", both),
        ("X·Xᵀ whole", "column scale and error feedback", fed_back),
    ):
        yield Case(
            "inputs",
            method,
            variant,
            recipe.alpha,
            functools.partial(_named, function),
        )


def _alpha(name: str, recipe: Recipe, with_inputs: bool = False) -> Case:
    def make(statistics: Statistics) -> Quantize:
        if with_inputs:
            return _named(lambda weight, m: _encoded(weight, recipe, m.inputs), statistics)
        return _each(recipe)

    method = f"{name}, E[x²] in the column scale" if with_inputs else name
    return Case("alpha", method, f"{100 * recipe.alpha:.3g} %", recipe.alpha, make)


def _each(recipe: Recipe) -> Quantize:
    return each(through_the_format(recipe))


def _encoded(weight: Tensor, recipe: Recipe, of_layer: InputStatistics) -> tuple[Tensor, int]:
    packed = encode(weight.bfloat16(), recipe, "weight", of_layer)
    stored = 8 * sum(tensor.nbytes for tensor in packed.tensors.values())
    return dequantize_weight(packed.tensors, packed.layout), stored


def _named(
    function: Callable[[Tensor, Moments], tuple[Tensor, int]], statistics: Statistics
) -> Quantize:
    found = statistics.moments  # here, since the bench takes no gradients

    def quantize(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        for name, weight in weights.items():
            yield name, *function(weight.float(), found[name])

    return quantize


if __name__ == "__main__":
    main()
