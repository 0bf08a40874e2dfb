"""Quality along the curve: effective bits against KL, for every recipe and for other methods.

    python benchmarks/quality.py SOURCE --text DECIDING [OTHER ...]

writes quality.json (after every row), quality.png, and the table in quality.md between its two
markers. Recipes and target sizes go through the real encoder and back. The first text decides.

--only WORD ... measures the methods whose names contain a word, and with no word none of them.
--resume measures only what quality.json does not have yet, text by text. Other rows stay as they
are; what was not measured on a text stays empty there.
--checkpoint DIR ... adds packed checkpoints, at the bits they really take.
--peers-python names the interpreter whose packages make the peers of outside_peers.py.
--libllama names a library of llama.cpp, whose quantizer makes the GGUF peers.
--calibration FILE ... are texts for the methods that need data, each a method of its own.
"""

import argparse
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
from quality_report import insert_table, plot, ranked, table
from torch import Tensor

from offline_quantize import dequantize_weight, list_recipes, quantize_weight
from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.checkpoint.safetensors_file import read_tensor
from offline_quantize.checkpoint.source import Checkpoint, open_checkpoint
from offline_quantize.evaluation.command import OriginalModel, Request
from offline_quantize.evaluation.kl import ReferenceDistributions, compare, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import PrecalibError, RecipeError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offline_quantize.method.recipes import Recipe

TARGETS = (3.3, 3.85, 4.3, 4.8)
OUTSIDE = Path(__file__).with_name("outside_peers.py")
Text = tuple[Sequence[Tensor], ReferenceDistributions]


def main() -> None:
    """Measure all methods and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="output folder"
    )
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
    path = arguments.out / "quality.json"
    rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
    wanted = select(methods(arguments, work), arguments.only)
    wanted += [checkpoint(folder) for folder in arguments.checkpoint]
    bench = Bench(arguments.source, arguments.text, arguments.tokens) if wanted else None
    for method in wanted:
        assert bench is not None
        known = {(row["method"], row["variant"]): row for row in rows}
        texts = known.get(method.key, {}).get("texts", {}) if arguments.resume else {}
        missing = [text for text in bench.texts if text not in texts]
        if not missing:
            continue
        row = bench.row(method, missing)
        row["texts"] = texts | row["texts"]
        rows = ranked((known | {method.key: row}).values())
        kl = ", ".join(f"{row['texts'][text]['kl']:.4f} ({text})" for text in missing)
        print(f"{method.name}, {method.variant}: {row['bits']:.3f} bits, KL {kl}", flush=True)
        write_json(path, {"source": arguments.source.name, "rows": rows})
    texts = [file.stem for file in arguments.text]
    rows = [row for row in rows if set(texts) & set(row["texts"])]
    if rows:
        insert_table(table(rows, texts), arguments.out / "quality.md")
        plot(rows, texts, arguments.out / "quality.png")


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
    """A model whose weights are replaced, and what the original says on every text."""

    def __init__(self, source: Path, files: Sequence[Path], tokens: int) -> None:
        checkpoint = open_checkpoint(source)
        request = Request(text=files, tokens=tokens)
        original = OriginalModel(checkpoint, request)
        tokenizer = load_tokenizer(source)
        self.texts: dict[str, Text] = {}
        for file in files:
            windows = text_windows(tokenizer, [file], tokens)
            self.texts[file.stem] = (windows, original.distributions(windows))
        original.unload()
        self.model: PreTrainedModel = load_original(source, request.dtype, request.device)
        self.parameters = dict(self.model.named_parameters())
        self.weights = decoder_weights(checkpoint)
        if absent := sorted(set(self.weights) - set(self.parameters)):
            raise SourceError(f"{absent[0]}: the model of transformers has no such weight")

    def row(self, method: Method, texts: Sequence[str]) -> dict[str, Any]:
        """Quantize by the method and measure on texts; other parameters are put back after."""
        start, stored, others = time.perf_counter(), 0, {}
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
            measured = {
                text: compare(self.texts[text][1], self.model, self.texts[text][0])
                .summary(text)
                .model_dump(by_alias=True, exclude={"of", "window"})
                for text in texts
            }
            for name, values in others.items():
                self.parameters[name].data.copy_(values)
        total = sum(weight.numel() for weight in self.weights.values())
        return method.facts() | {"bits": stored / total, "seconds": seconds, "texts": measured}


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
