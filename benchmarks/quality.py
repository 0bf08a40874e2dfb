"""Quality along the curve: effective bits against KL, for every recipe and for other methods.

    python benchmarks/quality.py SOURCE --text DECIDING [OTHER ...]

writes quality.json (after every row), quality.png, and the tables in quality.md between their two
markers. Recipes and target sizes go through the real encoder and back. The first text decides.

--name NAME writes NAME.json, NAME.png and NAME.md instead: each model has its own.

--only WORD ... measures the methods whose names contain a word, and with no word none of them.
--resume measures only what quality.json does not have yet, text by text. Other rows stay as they
are; what was not measured on a text stays empty there.
--checkpoint DIR ... adds packed checkpoints, at the bits they really take.
--tasks FILE ... also asks multiple-choice questions, of the methods that --only names and of
checkpoints; --limit N takes so many of each file.
--peers-python names the interpreter whose packages make the peers of outside_peers.py.
--libllama names a library of llama.cpp, whose quantizer makes the GGUF peers.
--calibration FILE ... are texts for the methods that need data, each a method of its own.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from methods import Method, Quantize, checkpoint, each, outside
from peers import Peer, peers
from quality_report import insert_table, plot, ranked, tables
from torch import Tensor

from offline_quantize import dequantize_weight, list_recipes, quantize_weight
from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.checkpoint.safetensors_file import read_tensor
from offline_quantize.checkpoint.source import Checkpoint, open_checkpoint
from offline_quantize.evaluation import multiple_choice
from offline_quantize.evaluation.command import OriginalModel, Request
from offline_quantize.evaluation.kl import ReferenceDistributions, compare, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import PrecalibError, RecipeError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offline_quantize.method.recipes import Recipe

TARGETS = (2.3, 3.3, 3.85, 4.3, 4.8)
OUTSIDE = Path(__file__).with_name("outside_peers.py")
Text = tuple[Sequence[Tensor], ReferenceDistributions]
Choices = tuple[
    Sequence[multiple_choice.Question], Sequence[Sequence[multiple_choice.Answer]], Tensor
]
LONGEST = 1 << 30  # tokens of a question; those of the usual tasks fit every model


def main() -> None:
    """Measure all methods and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="output folder"
    )
    parser.add_argument("--name", default="quality", help="of the output files")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--only", nargs="*", metavar="WORD")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--libllama", type=Path, metavar="FILE")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--work", type=Path, help="folder that keeps what outside peers made")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        with tempfile.TemporaryDirectory() as work:
            run(arguments, arguments.work or Path(work))
    except PrecalibError as error:
        sys.exit(f"quality: {error}")


def run(arguments: argparse.Namespace, work: Path) -> None:
    """Measure what is asked for, each row saved at once; then table and plot."""
    path = arguments.out / f"{arguments.name}.json"
    rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
    wanted = select(methods(arguments, work), arguments.only)
    wanted += [checkpoint(folder) for folder in arguments.checkpoint]
    request = Request(text=arguments.text, tokens=arguments.tokens, tasks=arguments.tasks)
    request = dataclasses.replace(request, limit=arguments.limit)
    bench = Bench(arguments.source, request) if wanted else None
    for method in wanted:
        assert bench is not None
        known = {(row["method"], row["variant"]): row for row in rows}
        before = known.get(method.key, {}) if arguments.resume else {}
        texts, tasks = before.get("texts", {}), before.get("tasks", {})
        missing = [text for text in bench.texts if text not in texts]
        unasked = [task for task in bench.tasks if task not in tasks]
        if not missing and not unasked:
            continue
        row = bench.row(method, missing, unasked)
        if all_tasks := tasks | row["tasks"]:
            row["tasks"] = all_tasks
        else:
            del row["tasks"]
        found = [f"KL {row['texts'][text]['kl']:.4f} ({text})" for text in missing]
        found += [f"{100 * row['tasks'][task]['accuracy']:.1f} % ({task})" for task in unasked]
        row["texts"] = texts | row["texts"]
        rows = ranked((known | {method.key: row}).values())
        print(
            f"{method.name}, {method.variant}: {row['bits']:.3f} bits, {', '.join(found)}",
            flush=True,
        )
        write_json(path, {"source": arguments.source.name, "rows": rows})
    measured = {text for row in rows for text in row["texts"]}
    texts = [file.stem for file in arguments.text if file.stem in measured]
    rows = [row for row in rows if set(texts) & set(row["texts"])]
    if rows:
        insert_table(tables(rows, texts), path.with_suffix(".md"))
        plot(rows, texts, path.with_suffix(".png"))


def methods(arguments: argparse.Namespace, work: Path) -> list[Method]:
    """Recipes and peers that can run here."""
    inside = [Method(name, variant, each(peer)) for (name, variant), peer in peers().items()]
    library = ("--libllama", str(arguments.libllama)) if arguments.libllama else ()
    python = (arguments.peers_python, str(OUTSIDE), *library)
    others = outside(python, arguments.source, work, arguments.calibration)
    return recipes(list_recipes()) + targets(arguments.source) + inside + others


def recipes(names: Iterable[str]) -> list[Method]:
    """Recipes by name, as the real encoder carries them out."""
    known = list_recipes()
    return [
        Method(f"precalib {name.split('-')[0]}", name, each(through_the_format(known[name])))
        for name in names
    ]


def targets(source: Path) -> list[Method]:
    """`--target-bits` at the sizes in TARGETS, as far as the model can have them."""
    found = []
    for bits in TARGETS:
        try:
            plan = make_plan(open_checkpoint(source), Options(target_bits=bits))
        except RecipeError:
            continue
        chosen = {name: through_the_format(p.recipe) for name, p in plan.weight_plans.items()}
        found.append(Method("precalib --target-bits", f"{bits:g}", _by_name(chosen)))
    return found


def _by_name(chosen: Mapping[str, Peer]) -> Quantize:
    def quantize(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        for name, weight in weights.items():
            yield name, *chosen[name](weight.float())

    return quantize


def select(found: Sequence[Method], words: Sequence[str] | None) -> list[Method]:
    """The methods whose name or variant contains one of the words; all if there is no list."""
    if words is None:
        return list(found)
    return [method for method in found if any(word in " ".join(method.key) for word in words)]


class Bench:
    """A model whose weights are replaced, and what the original says on every text and task."""

    def __init__(self, source: Path, request: Request) -> None:
        checkpoint = open_checkpoint(source)
        original = OriginalModel(checkpoint, request)
        tokenizer = load_tokenizer(source)
        self.dtype = request.computed_in
        self.texts: dict[str, Text] = {}
        for file in request.text:
            windows = text_windows(tokenizer, [file], request.tokens)
            self.texts[file.stem] = (windows, original.distributions(windows))
        self.tasks: dict[str, Choices] = {}
        for file in request.tasks:
            asked = multiple_choice.read_questions(file, request.limit)
            answers = [multiple_choice.answers(question, tokenizer, LONGEST) for question in asked]
            self.tasks[file.stem] = (asked, answers, original.predictions(answers))
        original.unload()
        self.model: PreTrainedModel = load_original(source, self.dtype, request.device)
        self.parameters = dict(self.model.named_parameters())
        self.weights = decoder_weights(checkpoint)
        if absent := sorted(set(self.weights) - set(self.parameters)):
            raise SourceError(f"{absent[0]}: the model of transformers has no such weight")

    def row(
        self, method: Method, texts: Sequence[str], tasks: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Quantize by the method and measure; other parameters are put back after."""
        start, began, stored, others = time.perf_counter(), time.process_time(), 0, {}
        missing = set(self.weights)
        with torch.inference_mode():
            for name, values, bits in method.quantize(self.weights):
                parameter = self.parameters.get(name)
                if parameter is None:
                    raise SourceError(f"{method.name} made '{name}', which the model does not have")
                if name in self.weights:
                    missing.remove(name)
                else:
                    others[name] = parameter.detach().clone()
                parameter.data.copy_(values)
                stored += bits
            if missing:
                left = sorted(missing)[0]
                raise SourceError(f"{method.name} left out {left}; it must quantize every weight")
            seconds = time.perf_counter() - start
            cpu_seconds = method.cpu_seconds(time.process_time() - began)
            measured = {
                text: compare(self.texts[text][1], self.model, self.texts[text][0])
                .summary(text)
                .model_dump(by_alias=True, exclude={"of", "window"})
                for text in texts
            }
            answered = {task: self._answered(*self.tasks[task]) for task in tasks}
            for name, values in others.items():
                self.parameters[name].data.copy_(values)
        total = sum(weight.numel() for weight in self.weights.values())
        return method.facts() | {
            "bits": stored / total,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "dtype": str(self.dtype).removeprefix("torch."),
            "texts": measured,
            "tasks": answered,
        }

    def _answered(
        self,
        asked: Sequence[multiple_choice.Question],
        answers: Sequence[Sequence[multiple_choice.Answer]],
        original: Tensor,
    ) -> dict[str, Any]:
        found = multiple_choice.predictions(self.model, answers)
        return multiple_choice.summary(asked, original, found).model_dump(by_alias=True)


def decoder_weights(source: Checkpoint) -> dict[str, Tensor]:
    """The linear weights of the decoder, by name."""
    plan = make_plan(source, Options("rtn-4", {}, [], ()))
    return {
        name: read_tensor(source.root / file, name, entry)
        for file, entries in source.shards.items()
        for name, entry in entries.items()
        if name in plan.weight_plans
    }


def through_the_format(recipe: "Recipe") -> Peer:
    """A recipe as a function of a weight: packed by the real encoder, and unpacked."""

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        packed = quantize_weight(weight.bfloat16(), recipe)
        stored = 8 * sum(tensor.nbytes for tensor in packed.tensors.values())
        return dequantize_weight(packed.tensors, packed.layout), stored

    return quantize


if __name__ == "__main__":
    main()
