"""What the quality benchmark measures: a method makes the weights of a whole model."""

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import Peer
from safetensors import safe_open
from torch import Tensor

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from precalib_kernels.errors import SourceError

# From the decoder's linear weights, by name, to (name, dequantized weight, stored bits). Other
# parameters may be replaced too (AWQ scales the norms).
Quantize = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor, int]]]

BFLOAT16 = 16


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantize a model.

    name, variant: of its line in the plot, and of its point there.
    calibration:   the text it learnt from, none for a data-free method.
    note:          why its figures say less than they seem to.
    made:          file of weights that another program makes, with the CPU seconds that it took.
    """

    name: str
    variant: str
    quantize: Quantize
    calibration: str = ""
    note: str = ""
    made: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Name and variant."""
        return self.name, self.variant

    def facts(self) -> dict[str, Any]:
        """What a row says of the method."""
        facts = {"method": self.name, "variant": self.variant}
        return facts | {"calibration": self.calibration, "note": self.note}

    def cpu_seconds(self, own: float) -> float | None:
        """What it took on all cores together, None if unknown; `own`: this process'."""
        if self.made is None:
            return own
        with safe_open(self.made, framework="pt") as file:
            found = file.metadata().get("cpu_seconds")
        return None if found is None else float(found)


def each(peer: Peer) -> Quantize:
    """A function of one weight, applied to each."""

    def quantize(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        for name, weight in weights.items():
            yield name, *peer(weight.float())

    return quantize


def checkpoint(folder: Path) -> Method:
    """A packed checkpoint; weights that it keeps as they are count 16 bits."""

    def quantize(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        packed = open_packed(folder)
        modules = [f"{module}.weight" for module in packed.config.modules]
        if strange := sorted(set(modules) - set(weights)):
            raise SourceError(
                f"{folder}: packs {strange[0]}, which is no linear weight of this decoder; "
                "quantize SOURCE itself"
            )
        for name, weight in weights.items():
            if name in modules:
                module = name.removesuffix(".weight")
                yield name, packed.weight(module), 8 * packed.stored_bytes(module)
            else:
                yield name, weight, BFLOAT16 * weight.numel()

    return Method(*_name(folder), quantize, _calibration(folder))


def _name(folder: Path) -> tuple[str, str]:
    """A checkpoint's method, by what its manifest says of the inputs, and its variant."""
    known = read_manifest(folder).run.activations
    if known is None:
        return "precalib checkpoint", folder.name
    name = "precalib --feedback" if known["feedback"] else "precalib"
    own = "" if known["feedback"] else ", own text"
    texts = {"random": ", random tokens", "self": own, "file": f", {_calibration(folder)}"}
    return name + texts[known["text"]], folder.name


def _calibration(folder: Path) -> str:
    """The text file that a checkpoint learnt from, without its ending."""
    known = read_manifest(folder).run.activations or {}
    return Path(known.get("file", "")).stem


def outside(
    program: Sequence[str], source: Path, work: Path, calibration: Sequence[Path] = ()
) -> list[Method]:
    """The peers that a program can make: outside_peers.py, in some interpreter.

    work: keeps what it makes, so that it is made once.
    """
    found = []
    for facts in json.loads(_ask(program, "--list").splitlines()[-1]):
        for file in calibration if facts["calibrated"] else [None]:
            label = f"{facts['method']}, {file.stem}" if file else facts["method"]
            folder = work / f"{label} {facts['variant']}".replace("/", "-")
            words = (str(source), str(folder), facts["method"], facts["variant"])
            made = folder / "weights.safetensors"
            make = _making(program, made, (*words, str(file)) if file else words)
            text = file.stem if file else ""
            found.append(Method(label, facts["variant"], make, text, facts["note"], made))
    return found


def _making(program: Sequence[str], made: Path, words: Sequence[str]) -> Quantize:
    def quantize(_: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        if not made.exists():
            _ask(program, *words)
        with safe_open(made, framework="pt") as file:
            bits = json.loads(file.metadata()["stored_bits"])
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name), bits.get(name, 0)

    return quantize


def _ask(program: Sequence[str], *words: str) -> str:
    done = subprocess.run([*program, *words], capture_output=True, text=True)
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), "")
        raise SourceError(f"{' '.join((*program, *words))} failed: {last}")
    return done.stdout
