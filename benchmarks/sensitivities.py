"""Sensitivities of `--target-bits`: KL of the mixes that other factors would give.

    python benchmarks/sensitivities.py SOURCE --text FILE --work DIR

measures the KL of the model with the weights of one of PARTS quantized and all others original:
per weight, and against that of queries, this is the part's sensitivity. Then it makes a mix of
every case of CASES at every size and measures its KL. Each option of a mix is quantized once and
kept in DIR, as are the results, so it goes on where it was broken off. A mix that equals one
already measured is not measured again.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quality import decoder_weights
from torch import Tensor

from offline_quantize import open_packed, quantize_checkpoint
from offline_quantize.checkpoint.atomic_files import read_json, write_json
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.kl import compare, reference_distributions, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.planning import bit_allocation, selection
from offline_quantize.planning.activation_options import ActivationOptions
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import SourceError

SIZES = (3.3, 3.85, 4.8)
PART_OPTION = "balanced-3"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
LAYERS = ("first two layers", "last layer", "other layers")
PARTS = (*KINDS, *LAYERS)
# what each case changes in bit_allocation
CASES: Mapping[str, Mapping[str, Any]] = {
    "today": {},
    "no factors": {
        "WRITE_BACK_FACTOR": 1.0,
        "FIRST_FACTOR": 1.0,
        "LAST_FACTOR": 1.0,
        "SHARING_EXPONENTS": (0.0, 0.0),
    },
    "keys, values: 1": {"SHARING_EXPONENTS": (0.0, 0.0)},
    "keys, values: root": {"SHARING_EXPONENTS": (0.5, 0.5)},
    "keys, values: heads": {"SHARING_EXPONENTS": (1.0, 1.0)},
    "o, down: 1": {"WRITE_BACK_FACTOR": 1.0},
    "o, down: 2": {"WRITE_BACK_FACTOR": 2.0},
    "first two layers: 1": {"FIRST_FACTOR": 1.0},
    "first two layers: 3": {"FIRST_FACTOR": 3.0},
    "last layer: 1": {"LAST_FACTOR": 1.0},
    "last layer: 5": {"LAST_FACTOR": 5.0},
}


class Bench:
    """A model, what it says on a text, and its weights by each option of a mix."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.source, self.mode = arguments.source, arguments.mode
        self.known = None if self.mode == "none" else ActivationOptions()
        self.checkpoint = open_checkpoint(self.source)
        self.folder = arguments.work / self.source.name / self.mode
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text, self.tokens = arguments.text.stem, arguments.tokens
        self.model: Any = load_original(self.source, torch.bfloat16, "cpu")
        self.parameters = dict(self.model.named_parameters())
        self.windows = text_windows(load_tokenizer(self.source), [arguments.text], arguments.tokens)
        self.reference = reference_distributions(self.model, self.windows)
        self.original = decoder_weights(self.checkpoint)
        self.made: dict[str, dict[str, Tensor]] = {}

    def parts(self, wanted: list[str]) -> None:
        """KL with one part of the weights quantized, and the part's number of weights."""
        path = self.folder / "parts.json"
        found = read_json(path, SourceError, "remove it") if path.exists() else {}
        depth = int(self.checkpoint.text_config["num_hidden_layers"])
        for part in wanted:
            if part in found:
                continue
            count = 0
            for name, values in self._weights(PART_OPTION).items():
                chosen = belongs(name, part, depth)
                count += values.numel() * chosen
                self.parameters[name].data.copy_(values if chosen else self.original[name])
            found[part] = {"kl": self._measured(), "weights": count}
            print(f"{self.folder}: {part}: KL {found[part]['kl']:.4f}", flush=True)
            write_json(path, found)

    def run(self, sizes: list[float], cases: list[str]) -> None:
        """Measure what is not measured yet."""
        path = self.folder / "results.json"
        rows = read_json(path, SourceError, "remove it")["rows"] if path.exists() else []
        for size in sizes:
            for case in cases:
                where = {"text": self.text, "tokens": self.tokens, "size": size}
                if any(where | {"case": case} == {k: r[k] for k in (*where, "case")} for r in rows):
                    continue
                mix = self.mix(size, CASES[case])
                same = [row for row in rows if where.items() <= row.items() and row["mix"] == mix]
                kl = same[0]["kl"] if same else self.kl(mix)
                rows.append(where | {"case": case, "kl": kl, "mix": mix})
                print(f"{self.folder}: {size:g} bits, {case}: KL {kl:.4f}", flush=True)
                write_json(path, {"rows": rows})

    def mix(self, size: float, changes: Mapping[str, Any]) -> dict[str, str]:
        """Label of each weight's option, with changed factors."""
        with mock.patch.multiple(bit_allocation, **changes) if changes else mock.MagicMock():
            plan = make_plan(self.checkpoint, Options(target_bits=size, activations=self.known))
        return {name: weight.label for name, weight in plan.weight_plans.items()}

    def kl(self, mix: Mapping[str, str]) -> float:
        """KL of the model with these options."""
        for name, label in mix.items():
            self.parameters[name].data.copy_(self._weights(label)[name])
        return self._measured()

    def _measured(self) -> float:
        return float(compare(self.reference, self.model, self.windows).kl.double().mean())

    def _weights(self, label: str) -> dict[str, Tensor]:
        """All weights by one option, bfloat16."""
        if label not in self.made:
            folder = self.folder / label
            if not (folder / "precalib.json").exists():
                option = next(o for o in bit_allocation.OPTIONS if o.label == label)
                changes: dict[str, Any] = {}
                if "--" in label:
                    changes["alpha"] = option.recipe.alpha
                if "--salient-bits" in label:
                    changes["salient_bits"] = option.recipe.layout.salient_bits
                recipe = label.split()[0]
                feedback = self.mode == "feedback"
                text = "self" if feedback else self.mode
                quantize_checkpoint(
                    self.source,
                    folder,
                    recipe,
                    activations=text,
                    feedback=feedback,
                    jobs=1,
                    **changes,
                )
            self.made[label] = {
                f"{module}.weight": open_packed(folder).weight(module).bfloat16()
                for module in open_packed(folder).config.modules
            }
        return self.made[label]


def belongs(name: str, part: str, depth: int) -> bool:
    """Whether a weight is one of a part, in a model of so many layers."""
    if part in KINDS:
        return f".{part}_proj." in name
    match = selection.LAYER.search(name)
    layer = int(match[1]) if match else -1
    place = LAYERS[0] if layer < 2 else LAYERS[1] if layer == depth - 1 else LAYERS[2]
    return place == part


def parts_table(work: Path) -> Iterator[str]:
    """KL per weight of each part, relative to that of the first part of its sort."""
    found = {
        f"{path.parent.parent.name}, {path.parent.name}": read_json(path, SourceError, "remove it")
        for path in sorted(work.glob("*/*/parts.json"))
    }
    yield "| part | " + " | ".join(found) + " |"
    yield "|---|" + "--:|" * len(found)
    for part in PARTS:
        cells = []
        for parts in found.values():
            each = {name: facts["kl"] / facts["weights"] for name, facts in parts.items()}
            unit = each.get(KINDS[0] if part in KINDS else LAYERS[-1])
            known = part in each and unit is not None
            cells.append(f"{parts[part]['kl']:.4f}; {each[part] / unit:.2f}" if known else "")
        yield f"| {part} | " + " | ".join(cells) + " |"


def table(work: Path) -> Iterator[str]:
    """KL of each case relative to today's, one column for each model, mode and size."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for path in sorted(work.glob("*/*/results.json")):
        for row in read_json(path, SourceError, "remove it")["rows"]:
            column = (row["text"], path.parent.parent.name, path.parent.name, f"{row['size']:g}")
            found.setdefault(column, {})[row["case"]] = row["kl"]
    yield "| factors | " + " | ".join(", ".join(column) for column in found) + " |"
    yield "|---|" + "--:|" * len(found)
    for case in CASES:
        cells = []
        for kl in found.values():
            if case not in kl:
                cells.append("")
            elif case == "today" or "today" not in kl:
                cells.append(f"{kl[case]:.4f}")
            else:
                cells.append(f"{kl[case] / kl['today']:.3f}")
        yield f"| {case} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--mode", choices=("none", "random", "feedback"), default="random")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.text:
        bench = Bench(arguments)
        bench.parts(arguments.parts)
        bench.run(arguments.sizes, arguments.cases)
    print("\n".join([*parts_table(arguments.work), "", *table(arguments.work)]))


if __name__ == "__main__":
    main()
