"""Questions that statistical pre-calibration (arXiv 2501.09107) leaves open, by measurement.

    python benchmarks/open_questions.py SOURCE --text FILE

measures what open-questions.json does not have yet, a row at a time, and makes plots and tables of
the rows of all models there. Rows that need E[x²], a Hessian or a Fisher diagonal take them from
text that the model writes itself.

--domains FILE ... are texts that error feedback also learns from; it is measured on every --text,
other rows on the first.
--only WORD ... measures the rows whose question, method or variant contains a word, and with no
word none of them.
--plot-only makes plots and tables without a model.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from methods import Method
from open_cases import Case, Inputs, cases
from open_questions_plots import plots
from open_questions_table import tables
from quality import Bench
from quality_report import insert_table
from weight_shapes import best_shares

from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.evaluation.command import Request
from precalib_kernels.errors import PrecalibError, SourceError

Row = dict[str, Any]
Key = tuple[Any, ...]


def main() -> None:
    """Measure what is missing; then plots and tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--domains", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--input-tokens", type=int, default=4096, help="for E[x²] and Hessians")
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
    model, first = arguments.source.name, arguments.text[0].stem
    known = {key(row) for row in rows}

    def wanted(*names: str) -> bool:
        words = arguments.only
        return words is None or any(word in " ".join(names) for word in words)

    def missing(case: Case) -> list[str]:
        """The texts that the case was not measured on: all matter to the question "domain"."""
        texts = [file.stem for file in arguments.text] if case.question == "domain" else [first]
        return [text for text in texts if key(described(case, model, text)) not in known]

    open_cases = [
        case
        for case in cases(arguments.domains)
        if wanted(case.question, case.method, case.variant) and missing(case)
    ]
    shapes = wanted("shape") and not any(
        (row["model"], row["question"]) == (model, "shape") for row in rows
    )
    if not open_cases and not shapes:
        return
    needed = {text for case in open_cases for text in missing(case)} | {first}
    files = [file for file in arguments.text if file.stem in needed]
    bench = Bench(arguments.source, Request(text=files, tokens=arguments.tokens))
    inputs = Inputs(arguments.source, bench.weights, arguments.input_tokens)
    for case in open_cases:
        method = Method(case.method, case.variant, case.make(inputs))
        found = bench.row(method, missing(case))
        for text, measured in found["texts"].items():
            row = described(case, model, text) | {"bits": found["bits"], **measured}
            rows.append(row)
            print(f"{key(row)}: {row['bits']:.3f} bits, KL {row['kl']:.4f}", flush=True)
        save()
    if shapes:
        for facts in best_shares(bench.weights, inputs.of()):
            rows.append({"model": model, "question": "shape", **facts})
        save()


def described(case: Case, model: str, text: str) -> Row:
    """What a row says of its case."""
    return {
        "model": model,
        "question": case.question,
        "method": case.method,
        "variant": case.variant,
        "share": case.share,
        "text": text,
    }


def key(row: Mapping[str, Any]) -> Key:
    """What tells a row from others."""
    return tuple(row.get(name) for name in ("model", "question", "method", "variant", "text"))


if __name__ == "__main__":
    main()
