"""Peers that quantize a whole model with packages which may live in an interpreter of their own.

    PYTHON outside_peers.py [--libllama FILE] --list
    PYTHON outside_peers.py [--libllama FILE] SOURCE FOLDER METHOD VARIANT [CALIBRATION]

--list prints as JSON what can be made with the packages of this interpreter, and with a library of
llama.cpp. The second form writes FOLDER/weights.safetensors: every parameter that changed,
dequantized, and in its metadata the bits stored for each quantized weight and the CPU seconds that
it took, on all cores together.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import adpq_peers
import gguf_peers
import llmcompressor_peers
import torch
import turbopress_peers
from gguf_peers import Found
from torch import Tensor

GRID = (
    "The model's weights come from a GGUF file, and these types find its grids again, some wholly, "
    "some in part: no peers. The shuffled rows are."
)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A point that can be made: parameters and stored bits from a model's folder and a text."""

    method: str
    variant: str
    make: Callable[[Path, Path | None], Found]
    calibrated: bool = False
    note: str = ""


def main() -> None:
    """List or make."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libllama", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    peers = available(arguments.libllama)
    if arguments.list:
        keys = ("method", "variant", "calibrated", "note")
        print(json.dumps([{key: getattr(peer, key) for key in keys} for peer in peers]))
        return
    source, folder, method, variant, *text = arguments.words
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for peer in peers:
        if (peer.method, peer.variant) == (method, variant):
            start = time.process_time()
            found = peer.make(Path(source), Path(text[0]) if text else None)
            write(*found, time.process_time() - start, Path(folder))
            return
    sys.exit(f"{method} {variant} cannot be made here; --list shows what can")


def available(libllama: Path | None) -> list[Peer]:
    """What the installed packages can make."""
    found = []
    if libllama:
        for method, kinds in gguf_peers.METHODS.items():
            calibrated = method == gguf_peers.WITH_MATRIX
            note = GRID if method == gguf_peers.AS_MADE else ""
            for kind in kinds:
                make = functools.partial(gguf_peers.make, libllama, method, kind)
                found.append(Peer(method, kind, make, calibrated, note))
    if importlib.util.find_spec("llmcompressor"):
        for scheme in llmcompressor_peers.SCHEMES:
            make = functools.partial(llmcompressor_peers.make, scheme)
            calibrated = scheme.method in llmcompressor_peers.CALIBRATED
            found.append(Peer(scheme.method, scheme.variant, make, calibrated))
    if importlib.util.find_spec("turbopress"):
        for point in turbopress_peers.SCHEMES:
            make = functools.partial(turbopress_peers.make, point)
            found.append(Peer(point.method, point.variant, make, bool(point.windows)))
    if importlib.util.find_spec("auto_adpq"):
        for bits in adpq_peers.BITS:
            found.append(Peer("auto-adpq", adpq_peers.variant(bits), _adpq(bits)))
    return found


def write(
    weights: dict[str, Tensor], bits: dict[str, int], cpu_seconds: float, folder: Path
) -> None:
    """The result as a file, whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished.safetensors"
    metadata = {"stored_bits": json.dumps(bits), "cpu_seconds": f"{cpu_seconds:.1f}"}
    save_file(weights, unfinished, metadata=metadata)
    unfinished.rename(folder / "weights.safetensors")


def _adpq(bits: int) -> Callable[[Path, Path | None], Found]:
    return lambda source, _: adpq_peers.make(bits, source)


if __name__ == "__main__":
    main()
