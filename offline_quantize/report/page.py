"""The page itself: numbers and pictures put into words and into the template."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from offline_quantize.checkpoint.manifest import RunRecord
from offline_quantize.checkpoint.source import architecture
from offline_quantize.evaluation.result import Interval
from offline_quantize.report import MARK, figures
from offline_quantize.report.contents import Contents, Weight, ratios
from offline_quantize.report.evaluations import Evaluation
from offline_quantize.report.table import columns, strip
from offline_quantize.units import size

MOST_ROWS = 2000
STANDS_OUT = 1.5  # times the median error of a recipe
NOTEWORTHY_OVERFLOW = 0.01
NAMED = 5
DEVICES = {"cpu": "the CPU", "cuda": "the GPU"}
PICTURES = (
    "Above: how the values of a weight are spread, salient ones apart, on a logarithmic scale. "
    "Below: where in the matrix the salient ones are, darker for more of them. "
)
BEFORE = "Filled: the original; line: quantized. The classes are those of the quantized weight."


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence of "What stands out", the modules it is about, and whether it is good news."""

    good: bool
    text: str
    modules: Sequence[str] = ()

    @property
    def named(self) -> Sequence[str]:
        """The first few of the modules."""
        return self.modules[:NAMED]

    @property
    def more(self) -> str:
        """How many are not named."""
        left = len(self.modules) - NAMED
        return f" and {left:,} more" if left > 0 else ""


def render(contents: Contents) -> str:
    """The HTML page, complete in itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        mark=MARK,
        name=contents.packed.root.resolve().name,
        architecture=architecture(contents.packed.files.config),
        recipe=contents.packed.config.recipe,
        version=contents.manifest.precalib,
        options=_options(contents.manifest.run),
        tiles=list(_tiles(contents)),
        findings=list(findings(contents)),
        error_map=figures.error_map(contents.weights),
        unquantized=_unquantized(contents.manifest.unquantized),
        missing=list(_missing(contents)),
        serving=contents.serving,
        device=DEVICES[contents.device],
        **_evaluations(contents.evaluations),
        **_table(contents),
        **_pictures(contents),
    )


def findings(contents: Contents) -> Iterator[Finding]:
    """What somebody should look at first."""
    weights = contents.weights
    ratio = ratios(weights)
    order = sorted(range(len(weights)), key=lambda i: -ratio[i])
    out = [weights[i].module for i in order if ratio[i] > STANDS_OUT]
    if out:
        yield Finding(
            False,
            f"{_count(out, 'weight has', 'weights have')} more than {STANDS_OUT:g} times the "
            f"median error of the recipe, {ratio[order[0]]:.1f} times at most:",
            out,
        )
    else:
        yield Finding(
            True,
            f"No error is out of line: the largest is {ratio[order[0]]:.2f} times the median of "
            "its recipe.",
        )
    crowded = [w for w in weights if w.overflow_share > NOTEWORTHY_OVERFLOW]
    if crowded:
        crowded.sort(key=lambda weight: -weight.overflow_share)
        yield Finding(
            False,
            f"In {_count(crowded, 'weight', 'weights')} more than {NOTEWORTHY_OVERFLOW:.0%} is "
            "above λ' but found no place among its group's salient weights "
            f"({crowded[0].overflow_share:.1%} at most):",
            [weight.module for weight in crowded],
        )
    odd = [
        name for name, why in contents.manifest.unquantized.items() if why.startswith("input size")
    ]
    if odd:
        yield Finding(
            False,
            f"{_count(odd, 'matrix', 'matrices')} of the decoder could not be packed, as the "
            "input size is no multiple of 32:",
            odd,
        )


def _count(things: Sequence[Any], one: str, many: str) -> str:
    return f"{len(things):,} {one if len(things) == 1 else many}"


def _tiles(contents: Contents) -> Iterator[Mapping[str, str]]:
    totals, files = contents.manifest.totals, contents.manifest.files

    def tile(what: str, value: str, about: str) -> Mapping[str, str]:
        return {"what": what, "value": value, "about": about}

    before, after = contents.manifest.bytes_before, contents.manifest.bytes_after
    yield tile(
        "effective bits per weight",
        f"{totals.bits_per_weight:.3f}",
        f"Eq. 13 of the paper: {totals.eq13_bits_per_weight:.3f}",
    )
    yield tile("packed weights", size(totals.stored_bytes), "of what was quantized")
    yield tile(
        "all tensors",
        size(after),
        f"from {size(before)}, {before / after:.2f} times; {size(totals.unquantized_bytes)} kept",
    )
    on_disk = sum(file.size for file in files.values())
    yield tile("all files", size(on_disk), f"{len(files):,} files beside the manifest")
    yield tile(
        "weights",
        f"{totals.weights:,}",
        f"in {_count(contents.weights, 'matrix', 'matrices')}",
    )
    yield tile("relative error", f"{totals.mean_relative_error:.5f}", "mean over all weights")
    known = contents.seconds is not None
    yield tile(
        "seconds to quantize",
        f"{contents.seconds:.1f}" if known else "–",
        "the whole run, files to files" if known else "not recorded",
    )


def _options(run: RunRecord) -> str:
    """The options beside the recipe that decided which weight became what."""
    given = [*(("--override", text) for text in run.overrides), *(("--keep", t) for t in run.keep)]
    return " ".join(f"{option} {shlex.quote(value)}" for option, value in given)


def _unquantized(unquantized: Mapping[str, str]) -> list[Finding]:
    reasons: dict[str, list[str]] = {}
    for name, why in unquantized.items():
        reasons.setdefault(why, []).append(name)
    return [
        Finding(True, f"{why}, {_count(names, 'tensor', 'tensors')}", names)
        for why, names in sorted(reasons.items())
    ]


def _missing(contents: Contents) -> Iterator[Mapping[str, str]]:
    folder = shlex.quote(str(contents.packed.root))
    if contents.seconds is None:
        yield {
            "what": "The seconds that quantizing takes, which a checkpoint does not record",
            "how": "precalib quantize SOURCE TARGET --report FILE",
        }
    if not contents.compared:
        yield {
            "what": "Histograms of the weights before quantizing",
            "how": f"precalib report {folder} --against SOURCE",
        }
    if not any(evaluation.own for evaluation in contents.evaluations):
        yield {
            "what": "How the model's output changed",
            "how": f"precalib eval {folder} --against SOURCE --self-generated --json eval.json && "
            f"precalib report {folder} --eval eval.json",
        }


def _evaluations(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    texts, tasks = [], []
    for evaluation in sorted(evaluations, key=lambda e: e.result.bits_per_weight):
        if text := evaluation.result.text:
            perplexity = _with_interval(text.perplexity, text.perplexity_interval, ".2f")
            original = text.original_perplexity, text.original_perplexity_interval
            row = {
                "recipe": evaluation.result.recipe,
                "own": evaluation.own,
                "bits": f"{evaluation.result.bits_per_weight:.3f}",
                "on": evaluation.measured_on,
                "kl": _with_interval(text.kl, text.kl_interval, ".4f"),
                "agreement": _with_interval(text.agreement, text.agreement_interval, ".1%"),
                "perplexity": perplexity,
                "original": _with_interval(*original, ".2f"),
            }
            texts.append(row)
    for evaluation in evaluations:
        for name, task in (evaluation.result.tasks or {}).items():
            original = task.original_accuracy, task.original_accuracy_interval
            row = {
                "recipe": evaluation.result.recipe,
                "own": evaluation.own,
                "name": Path(name).name,
                "questions": f"{task.questions:,}",
                "accuracy": _with_interval(task.accuracy, task.accuracy_interval, ".1%"),
                "original": _with_interval(*original, ".1%"),
                "same": f"{task.same_choice:.1%}",
            }
            tasks.append(row)
    return {"evaluations": texts, "tasks": tasks, "curve": figures.curve(evaluations)}


def _with_interval(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}–{high:{form}}]"


def _table(contents: Contents) -> dict[str, Any]:
    weights = contents.weights
    order = sorted(range(len(weights)), key=lambda i: -weights[i].error)
    shown = order[:MOST_ROWS]
    used = columns(weights)
    drawn = {weight.module for weight, _ in contents.pictures}
    rows = [
        {
            "index": i,
            "module": weights[i].module,
            "picture": _picture_id(weights[i]) if weights[i].module in drawn else "",
            "cells": [column.cell(weights[i]) for column in used],
            "strip": strip(weights[i].positions),
        }
        for i in shown
    ]
    caption = f"{_count(weights, 'weight', 'weights')}, largest error first."
    if len(order) > MOST_ROWS:
        caption = (
            f"The {MOST_ROWS:,} weights of {len(order):,} with the largest error; "
            "'precalib inspect' lists all."
        )
    return {"columns": used, "rows": rows, "table_caption": caption}


def _pictures(contents: Contents) -> dict[str, Any]:
    return {
        "pictures": [
            {
                "id": _picture_id(weight),
                "module": weight.module,
                "svg": figures.picture(_picture_id(weight), weight, spread),
                "about": f"{weight.shape[0]:,} × {weight.shape[1]:,}, error {weight.error:.5f}",
            }
            for weight, spread in contents.pictures
        ],
        "pictures_about": PICTURES + (BEFORE if contents.compared else ""),
    }


def _picture_id(weight: Weight) -> str:
    return f"weight-{weight.module}"
