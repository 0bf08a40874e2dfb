"""Hessians for error feedback, side by side: of the layer's output, and of the model's loss.

    python benchmarks/hessians.py SOURCE --text FILE --out DIRECTORY

The model writes its own text, from which all statistics come; FILE is for measuring alone. Writes
hessians-NAME.json after every row, and prints each. --tune also tunes the scales of every row by
gradient. --resume keeps the rows that are there; statistics are kept in DIRECTORY in any case.
"""

import argparse
import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from output_hessians import output_hessians
from torch import Tensor, nn

from offline_quantize.calibration.scale_tuning import tune_factors
from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.evaluation.begin_token import begin_tokens
from offline_quantize.evaluation.kl import (
    WINDOW,
    ReferenceDistributions,
    compare,
    generate_text,
    reference_distributions,
    text_windows,
)
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.method import recipes
from offline_quantize.method.encode import encode
from offline_quantize.method.input_statistics import InputStatistics
from precalib_kernels.errors import PrecalibError, SourceError
from precalib_kernels.format import reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offline_quantize.method.recipes import Recipe

SEED = 1  # of the text that statistics come from; `precalib eval --self-generated` has 0
HELD_OUT = 4  # windows of that text that nothing is learnt from
Statistics = Mapping[str, InputStatistics]


def main() -> None:
    """Measure all rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=3072, help="of the text")
    parser.add_argument("--begin-token", action="store_true", help="as of precalib eval")
    parser.add_argument(
        "--windows", type=int, default=8, help=f"of {WINDOW} tokens, for statistics"
    )
    parser.add_argument("--recipes", nargs="+", default=["balanced-3", "balanced-4"])
    parser.add_argument("--hessians", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tune", type=int, nargs="*", default=[], metavar="EPOCHS")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except PrecalibError as error:
        sys.exit(f"hessians: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Measure what is asked for, each row saved at once."""
    path = arguments.out / f"hessians-{arguments.source.name}.json"
    kept = arguments.resume and path.exists()
    rows = read_json(path, SourceError, "remove it")["rows"] if kept else []
    bench = Bench(arguments)
    for kind in arguments.hessians:
        statistics: Statistics | None = None
        for name in arguments.recipes:
            wanted = [
                epochs for epochs in (0, *arguments.tune) if not _has(rows, name, kind, epochs)
            ]
            if not wanted:
                continue
            statistics = bench.statistics(kind) if statistics is None else statistics
            bench.quantize(recipes.find(name), statistics)
            for epochs in wanted:
                row = {"recipe": name, "hessian": kind, "epochs": epochs, **bench.measure(epochs)}
                rows.append(row)
                print(row, flush=True)
                write_json(path, {"source": arguments.source.name, "rows": rows})


def _has(rows: Sequence[Mapping[str, Any]], recipe: str, kind: str, epochs: int) -> bool:
    wanted = (recipe, kind, epochs)
    return any((row["recipe"], row["hessian"], row["epochs"]) == wanted for row in rows)


class Bench:
    """A model whose weights are replaced, texts, and what the original says on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.source = arguments.out, arguments.source
        self.model: PreTrainedModel = load_original(self.source, torch.bfloat16, "cpu")
        self.original = copy.deepcopy(self.model)
        self.windows = self._own_text(arguments.windows + HELD_OUT)
        self.windows, held_out = self.windows[:-HELD_OUT], self.windows[-HELD_OUT:]
        tokenizer = load_tokenizer(self.source)
        config = self.model.config.get_text_config().to_dict()
        begin = begin_tokens(tokenizer, config, arguments.begin_token)
        text = text_windows(tokenizer, [arguments.text], arguments.tokens, begin=begin)
        self.texts: dict[str, tuple[list[Tensor], ReferenceDistributions]] = {
            name: (windows, reference_distributions(self.original, windows))
            for name, windows in (("text", text), ("held_out", held_out))
        }
        self.quantized: dict[str, Tensor] = {}
        self.seconds = 0.0

    def statistics(self, kind: str) -> Statistics:
        """Of all linear layers of the decoder; made once for each model."""
        path = self.out / f"statistics-{self.source.name}-{kind}-{len(self.windows)}.pt"
        if path.exists():
            stored = torch.load(path)
        else:
            start = time.process_time()
            made = KINDS[kind](self.original, self.windows)
            stored = {name: (s.mean_square, s.hessian) for name, s in made}
            seconds = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"{kind}: {seconds:.0f} s of processor time, peak {peak:.2f} GB", flush=True)
            torch.save(stored, path)
        return {name: InputStatistics(*parts) for name, parts in stored.items()}

    def quantize(self, recipe: "Recipe", statistics: Statistics) -> None:
        """Put the weights that the real encoder makes into the model."""
        start = time.process_time()
        for name, inputs in statistics.items():
            weight = self.original.get_parameter(f"{name}.weight").detach()
            encoded = encode(weight, recipe, name, inputs)
            self.quantized[name] = reference.dequantize(
                encoded.tensors, encoded.layout, weight.shape[1]
            )
        self.seconds = time.process_time() - start
        self._put(self.quantized)

    def measure(self, epochs: int) -> dict[str, Any]:
        """KL on both texts, after so many epochs of tuning the scales."""
        start, seconds = time.process_time(), self.seconds
        if epochs:
            factors = tune_factors(
                self.original, self.model, list(self.quantized), self.windows, epochs=epochs
            )
            seconds += time.process_time() - start
            self._put(
                {
                    name: weight * factors[name].row[:, None] * factors[name].column
                    for name, weight in self.quantized.items()
                }
            )
        found: dict[str, Any] = {"seconds": round(seconds, 1)}
        for text, (windows, distributions) in self.texts.items():
            result = compare(distributions, self.model, windows).summary(text)
            found |= {f"{text}_kl": result.kl, f"{text}_interval": result.kl_interval}
            found |= {f"{text}_agreement": result.agreement, f"{text}_tokens": result.tokens}
        if epochs:
            self._put(self.quantized)
        return found

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                self.model.get_parameter(f"{name}.weight").copy_(weight)

    def _own_text(self, count: int) -> list[Tensor]:
        path = self.out / f"text-{self.source.name}-{count}.pt"
        if not path.exists():
            torch.save(generate_text(self.original, WINDOW * count, WINDOW, SEED), path)
        return list(torch.load(path))


def no_hessian(
    model: "PreTrainedModel", windows: Sequence[Tensor]
) -> Iterator[tuple[str, InputStatistics]]:
    """E[x²] alone: the column scale knows the inputs, and errors are not fed back."""
    for name, statistics in layer(model, windows):
        yield name, InputStatistics(statistics.mean_square)


@torch.inference_mode()
def layer(
    model: "PreTrainedModel", windows: Sequence[Tensor]
) -> Iterator[tuple[str, InputStatistics]]:
    """E[x·xᵀ] of every linear layer but the head."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, __: Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    for window in windows:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    tokens = sum(map(len, windows))
    for name, total in sums.items():
        yield name, InputStatistics(total.diagonal() / tokens, total / tokens)


KINDS: dict[str, Callable[..., Iterator[tuple[str, InputStatistics]]]] = {
    "none": no_hessian,
    "layer": layer,
    "token": lambda model, windows: output_hessians(model, windows, piece=1),
    "output": output_hessians,
}


if __name__ == "__main__":
    main()
