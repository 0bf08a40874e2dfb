"""`precalib verify`: is a packed checkpoint whole, sound, and what it says it is?"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from offline_quantize.assembly import Progress, digest
from offline_quantize.packed import PackedCheckpoint, open_packed, read_manifest
from offline_quantize.source import open_checkpoint
from offline_quantize.tensorfile import read_tensor
from precalib_kernels.errors import FormatError, PrecalibError

ERROR_TOLERANCE = 1e-3  # relative: sums are taken in another order than while quantizing


def verify(directory: Path, against: Path | None, progress: Progress) -> Iterator[str]:
    """Yield one sentence per fault; nothing for a sound checkpoint.

    Checks the size and hash of every file, the structure and value ranges of every packed tensor,
    and with `against` (the source checkpoint) that every relative error is the recorded one.

    Raises PrecalibError when the checkpoint or the source cannot be read at all.
    """
    packed = open_packed(directory)
    manifest = read_manifest(packed)
    source = open_checkpoint(against) if against else None
    for name, recorded in manifest["files"].items():
        progress.begin(name)
        yield from _file_faults(directory / name, recorded)
    yield from _table_faults(packed, set(manifest["tensors"]))
    locations = (
        {n: (f, e) for f, entries in source.shards.items() for n, e in entries.items()}
        if source
        else {}
    )
    for module in packed.config.modules:
        progress.begin(module)
        try:
            weight = packed.weight(module)
        except PrecalibError as error:
            yield str(error)
            continue
        if source is None:
            continue
        name = f"{module}.weight"
        if name not in locations:
            yield f"{source.root}: tensor '{name}' is missing; this is not the source"
            continue
        file, entry = locations[name]
        original = read_tensor(source.root / file, name, entry)
        recorded = manifest["tensors"].get(module, {}).get("relative_error", -1.0)
        yield from _error_faults(f"{directory}: {module}", original, weight, recorded)
        progress.advance(entry.nbytes)


def _file_faults(path: Path, recorded: dict[str, object]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: the file is missing; copy the checkpoint again"
    elif (found := digest(path)) != recorded:
        key = "size" if found["size"] != recorded.get("size") else "sha256"
        yield f"{path}: its {key} is not the recorded one; copy the checkpoint again"


def _table_faults(packed: PackedCheckpoint, recorded: set[str]) -> Iterator[str]:
    for module in sorted(recorded ^ set(packed.config.modules)):
        yield f"{packed.root}: {module} is not both in config.json and in precalib.json"
    expected = set()
    for module in packed.config.modules:
        try:
            expected |= set(packed.stored_names(module))
        except FormatError as error:
            yield str(error)
    missing = sorted(expected - packed.locations.keys())
    for name in missing:
        yield f"{packed.root}: tensor '{name}' is missing; quantize the model again"


def _error_faults(where: str, original: Tensor, weight: Tensor, recorded: float) -> Iterator[str]:
    if original.shape != weight.shape:
        yield f"{where}: the source weight has shape {list(original.shape)}; this is not the source"
        return
    original = original.float()
    signal = float(original.square().sum())
    error = float((original - weight).square().sum()) / signal if signal else 0.0
    if abs(error - recorded) > ERROR_TOLERANCE * max(error, recorded, 1e-9):
        yield f"{where}: relative error {error:.6g} instead of the recorded {recorded:.6g}"
