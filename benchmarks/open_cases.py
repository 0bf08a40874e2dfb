"""The rows of open_questions.py: how each quantizes, by question."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from input_moments import fisher_diagonals, input_moments
from methods import Quantize, each
from quality import through_the_format
from salience_rules import (
    Score,
    magnitude,
    original_magnitude,
    quantize_by_score,
    weighted_magnitude,
)
from torch import Tensor

from offline_quantize import dequantize_weight, list_recipes
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.command import OriginalModel, Request
from offline_quantize.evaluation.kl import text_windows
from offline_quantize.evaluation.models import load_tokenizer
from offline_quantize.method.encode import encode
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.method.recipes import Recipe, adjust, for_head

SHARES = (0.03, 0.05, 0.08, 0.12, 0.15)  # the paper looks at 3 to 15 %
COUNTS = (1, 2, 4, 10, 19)  # of 128: .8 to 15 %
WINDOW = 128  # tokens of a text that goes through the model at once
OWN = "own text"
SCALED = "E[x²] in the column scale"
FED_BACK = "error feedback"


@dataclasses.dataclass(frozen=True)
class Case:
    """A row to measure.

    question: "inputs", "calibration", "alpha", "rules" or "domain".
    share:    of salient weights that the rule aims at.
    make:     the method's function, given what is known of the model's inputs.
    """

    question: str
    method: str
    variant: str
    share: float
    make: Callable[["Inputs"], Quantize]


class Inputs:
    """What is known of the inputs of a model's weights, computed when it is first asked for.

    tokens: of each text.
    """

    def __init__(self, source: Path, weights: Mapping[str, Tensor], tokens: int) -> None:
        self.source, self.weights, self.tokens = source, weights, tokens
        self.found: dict[str, Mapping[str, InputStatistics]] = {}
        request = Request(self_generated=True, tokens=tokens)
        self.original = OriginalModel(open_checkpoint(source), request)

    def of(self, file: Path | None = None) -> Mapping[str, InputStatistics]:
        """E[x²] and Hessians over a file's first tokens; over the model's own text for None."""
        key = str(file)
        if key not in self.found:
            windows = self.own_text if file is None else self._windows(file)
            with torch.inference_mode(mode=False):
                self.found[key] = input_moments(self.original.model, self.weights, windows)
        return self.found[key]

    @functools.cached_property
    def fisher(self) -> Mapping[str, Tensor]:
        """Fisher diagonals over the model's own text."""
        return fisher_diagonals(self.original.model, self.weights, self.own_text)

    @functools.cached_property
    def own_text(self) -> Sequence[Tensor]:
        """Windows that the model writes."""
        return self.original.generated_text(min(WINDOW, self.tokens))

    def _windows(self, file: Path) -> list[Tensor]:
        windows = text_windows(load_tokenizer(self.source), [file], self.tokens, WINDOW)
        return [window for window in windows if len(window) == len(windows[0])]


def cases(domains: Sequence[Path] = ()) -> Iterator[Case]:
    """All rows that every model gets; of the question "domain", one for each of the files."""
    known = list_recipes()
    yield from inputs(known["balanced-3"])
    yield from calibration(known)
    for name in ("paper-3", "paper-4"):
        for share in SHARES:
            yield _alpha(name, adjust(known[name], alpha=share))
    for name in ("balanced-3", "balanced-4"):
        for count in COUNTS:
            yield _alpha(name, adjust(known[name], alpha=count / 128))
    for name in ("balanced-2", "balanced-3"):  # balanced-2 is of no use without inputs
        for count in COUNTS:
            yield _alpha(name, adjust(known[name], alpha=count / 128), SCALED)
    yield from rules(known["balanced-3"])
    yield from domain(known["balanced-3"], domains)


def inputs(recipe: Recipe) -> Iterator[Case]:
    """What is assumed of the inputs: X·Xᵀ = b·I, a diagonal, the whole matrix."""
    plain = for_head("balanced-3")[1]

    def case(assumed: str, variant: str, make: Callable[[Inputs], Quantize]) -> Case:
        return Case("inputs", assumed, variant, recipe.alpha, make)

    yield case("X·Xᵀ = b·I", "no column scale", lambda _: each(through_the_format(plain)))
    yield case("X·Xᵀ = b·I", "column scale", lambda _: each(through_the_format(recipe)))
    diagonal = "X·Xᵀ = diag(E[x²])"
    yield case(diagonal, "in the trellis search", _scored(recipe, searched=True))
    yield case(diagonal, "in the column scale", _scored(recipe, scaled=True))
    yield case(diagonal, "in both", lambda known: _encoded(recipe, known.of(), whole=False))
    whole = "X·Xᵀ whole"
    yield case(whole, "no column scale", lambda known: _encoded(plain, known.of()))
    yield case(whole, "column scale", lambda known: _encoded(recipe, known.of()))


def calibration(known: Mapping[str, Recipe]) -> Iterator[Case]:
    """Calibration after pre-calibration, against either alone."""
    for name in ("rtn-3", "rtn-4"):
        yield Case("calibration", name, "none", 0, _plain(known[name]))
    name = "balanced-4"
    yield Case("calibration", name, "E[x²]", known[name].alpha, _fed(known[name], whole=False))
    for name in ("rtn-3", "paper-3", "rtn-4", "paper-4", "balanced-4"):
        yield Case("calibration", name, FED_BACK, known[name].alpha, _fed(known[name]))


def rules(recipe: Recipe) -> Iterator[Case]:
    """Salience by other scores, in one layout, so at equal bits."""

    def by_inputs(known: Inputs, name: str) -> Score:
        return weighted_magnitude(known.of()[name].mean_square)

    def by_fisher(known: Inputs, name: str) -> Score:
        return weighted_magnitude(known.fisher[name])

    scores: dict[str, Callable[[Inputs, str], Score]] = {
        "|w| / column scale": lambda *_: magnitude,
        "|w|": lambda *_: original_magnitude,
        "|w|·√E[x²]": by_inputs,
        "|w|·√Fisher": by_fisher,
    }
    group, tensor = "largest of each group", "one threshold per tensor"
    for variant, score in scores.items():
        yield Case("rules", group, variant, recipe.alpha, _scored(recipe, score))
        make = _scored(recipe, score, per_tensor=True)
        yield Case("rules", tensor, variant, recipe.alpha, make)
    for variant in ("|w| / column scale", "|w|·√E[x²]"):
        make = _scored(recipe, scores[variant], scaled=True, searched=True)
        yield Case("rules", f"{group}, E[x²] known", variant, recipe.alpha, make)


def domain(recipe: Recipe, files: Sequence[Path]) -> Iterator[Case]:
    """Error feedback that learns from one text and is measured on others."""
    for file in (None, *files):
        variant = OWN if file is None else file.stem
        yield Case("domain", f"balanced-3, {FED_BACK}", variant, recipe.alpha, _fed(recipe, file))


def _alpha(name: str, recipe: Recipe, known: str = "") -> Case:
    make = _scored(recipe, scaled=True) if known else _plain(recipe)
    method = f"{name}, {known}" if known else name
    return Case("alpha", method, f"{100 * recipe.alpha:.3g} %", recipe.alpha, make)


def _plain(recipe: Recipe) -> Callable[[Inputs], Quantize]:
    return lambda _: each(through_the_format(recipe))


def _fed(
    recipe: Recipe, file: Path | None = None, whole: bool = True
) -> Callable[[Inputs], Quantize]:
    return lambda known: _encoded(recipe, known.of(file), whole)


def _encoded(recipe: Recipe, known: Mapping[str, InputStatistics], whole: bool = True) -> Quantize:
    """By the real encoder, which knows E[x²] and, if `whole`, the Hessian."""

    def function(name: str, weight: Tensor) -> tuple[Tensor, int]:
        of_layer = known[name] if whole else InputStatistics(known[name].mean_square)
        packed = encode(weight.bfloat16(), recipe, name, of_layer)
        stored = 8 * sum(tensor.nbytes for tensor in packed.tensors.values())
        return dequantize_weight(packed.tensors, packed.layout), stored

    return _named(function)


def _scored(
    recipe: Recipe,
    score: Callable[[Inputs, str], Score] = lambda *_: magnitude,
    per_tensor: bool = False,
    scaled: bool = False,
    searched: bool = False,
) -> Callable[[Inputs], Quantize]:
    """By a rule of salience, where the column scale or the search may know E[x²]."""

    def make(known: Inputs) -> Quantize:
        def function(name: str, weight: Tensor) -> tuple[Tensor, int]:
            of_layer = known.of()[name] if scaled or searched else None
            return quantize_by_score(
                weight,
                recipe,
                score(known, name),
                per_tensor,
                InputStatistics(of_layer.mean_square) if of_layer and scaled else None,
                of_layer.mean_square if of_layer and searched else None,
            )

        score(known, next(iter(known.weights)))  # here, since the bench takes no gradients
        return _named(function)

    return make


def _named(function: Callable[[str, Tensor], tuple[Tensor, int]]) -> Quantize:
    def quantize(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        for name, weight in weights.items():
            yield name, *function(name, weight.float())

    return quantize
