"""`precalib verify`: is a packed checkpoint whole, sound, and what it says it is?"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import MANIFEST
from offline_quantize.checkpoint.expert_slices import with_slices
from offline_quantize.checkpoint.file_patterns import is_inside
from offline_quantize.checkpoint.manifest import (
    REQUANTIZE_REMEDY,
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
)
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.safetensors_file import TensorLocation, read_pieces
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.checkpoint.transforms import Original, Transforms
from offline_quantize.method.encode import expected_if_ruined
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.weight_statistics import errors_agree, relative_error
from precalib_kernels.errors import FormatError, PrecalibError


def workload(directory: Path, against: Path | None) -> int:
    """Bytes that `verify` reports progress on. Raises PrecalibError as `verify` does."""
    packed, manifest = open_packed(directory), read_manifest(directory)
    hashed = sum(file.size for file in manifest.files.values())
    source = open_checkpoint(against).nbytes if against else 0
    stored = sum(
        location.entry.nbytes
        for name, location in packed.locations.items()
        if name.rpartition(".")[0] in packed.config.modules and name not in manifest.unquantized
    )
    return hashed + stored + source


def verify(directory: Path, against: Path | None, progress: Progress) -> Iterator[str]:
    """Yield one sentence per fault; nothing for a sound checkpoint.

    Checks the size and hash of every file, the structure and value ranges of every packed tensor,
    and with `against` (the source checkpoint) that every relative error is the recorded one and as
    small as its recipe makes it, and that every other tensor has the source's bytes.

    Raises PrecalibError when the checkpoint or the source cannot be read at all.
    """
    packed, manifest = open_packed(directory), read_manifest(directory)
    source = open_checkpoint(against) if against else None
    yield from faults_of_files(packed, manifest, progress)
    transforms = Transforms.of(directory, manifest.run.transform)
    if source is not None:
        try:
            transforms.check()
        except PrecalibError as error:
            yield f"{error}; without it nothing can be compared with the source"
            source = None
    originals: Mapping[str, TensorLocation] = {}
    if source is not None:
        originals = with_slices(source.locations, packed.config.expert_tensors)
    for module in packed.config.modules:
        progress.begin(module)
        try:
            weight = packed.weight(module)
        except PrecalibError as error:
            yield str(error)
            continue
        progress.advance(packed.stored_bytes(module))
        if source is None:
            continue
        name = manifest.origin_of(module)
        if name not in originals:
            yield f"{source.root}: tensor '{name}' is missing; this is not the source"
            continue
        original = Original(originals[name], transforms).read()
        yield from _error_faults(f"{directory}: {module}", original, weight, module, manifest)
        progress.advance(originals[name].entry.nbytes)
    if source is not None:
        yield from _unquantized_faults(packed, originals, transforms, progress)


def check_files(packed: PackedCheckpoint, manifest: Manifest, progress: Progress) -> None:
    """Raise FormatError for the first of `faults_of_files`, before anything is made of them."""
    for fault in faults_of_files(packed, manifest, progress):
        raise FormatError(f"{fault}; nothing was written ('precalib verify' shows all faults)")


def faults_of_files(
    packed: PackedCheckpoint, manifest: Manifest, progress: Progress
) -> Iterator[str]:
    """Faults that show before any weight is unpacked: files, their hashes, tables of tensors."""
    directory = packed.root
    for name, recorded in manifest.files.items():
        if is_inside(name):
            yield from _file_faults(directory / name, recorded, progress)
        else:
            yield f"{directory / MANIFEST}: {name!r} lies outside of it; {REQUANTIZE_REMEDY}"
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in manifest.files:
            yield f"{path}: is not part of the checkpoint; remove it, or vLLM may load it"
    yield from _table_faults(packed, manifest)


def _file_faults(path: Path, recorded: FileRecord, progress: Progress) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: the file is missing; copy the checkpoint again"
    elif (found := record_file(path, progress)) != recorded:
        key = "size" if found.size != recorded.size else "sha256"
        yield f"{path}: its {key} is not the recorded one; copy the checkpoint again"


def _table_faults(packed: PackedCheckpoint, manifest: Manifest) -> Iterator[str]:
    for module in sorted(manifest.tensors.keys() ^ packed.config.modules.keys()):
        yield (
            f"{packed.root}: {module} is not both in config.json and in precalib.json; "
            f"{REQUANTIZE_REMEDY}"
        )
    for name in packed.config.expert_tensors:
        try:
            packed.check_expert_tensor(name)
        except PrecalibError as error:
            yield str(error)
    for name in manifest.unquantized:
        if name not in packed.locations:
            yield f"{packed.root}: tensor '{name}' is missing; {REQUANTIZE_REMEDY}"


def _error_faults(
    where: str, original: Tensor, weight: Tensor, module: str, manifest: Manifest
) -> Iterator[str]:
    if original.shape != weight.shape:
        yield f"{where}: the source weight has shape {list(original.shape)}; this is not the source"
        return
    error = relative_error(original.float(), weight)
    record = manifest.tensors.get(module)
    recorded = record.relative_error if record else -1.0
    if not errors_agree(error, recorded):
        yield (
            f"{where}: relative error {error:.6g} instead of the recorded {recorded:.6g}; "
            "this is not the source, or the weight is damaged"
        )
        return
    try:
        recipe = Recipe.from_dict(manifest.run.recipes[record.recipe if record else ""])
    except (KeyError, TypeError, PrecalibError):
        yield f"{where}: its recipe is missing or damaged in {MANIFEST}; {REQUANTIZE_REMEDY}"
        return
    expected = expected_if_ruined(original, recipe, error)
    if expected is not None:
        yield (
            f"{where}: relative error {error:.3g} where its recipe gives {expected:.3g}; "
            f"{REQUANTIZE_REMEDY}, "
            "and keep this weight with --keep if it stays as large"
        )


def _unquantized_faults(
    packed: PackedCheckpoint,
    originals: Mapping[str, TensorLocation],
    transforms: Transforms,
    progress: Progress,
) -> Iterator[str]:
    """Tensors that were to stay as they are, byte by byte."""
    copies = packed.locations
    for name, original in originals.items():
        if name.removesuffix(".weight") in packed.config.modules:
            continue
        progress.begin(name)
        if name not in copies:
            yield f"{packed.root}: tensor '{name}' of the source is missing; {REQUANTIZE_REMEDY}"
            continue
        if not _is_copy(original, copies[name], transforms):
            yield (
                f"{copies[name].path}: tensor '{name}' is not the source's; this is not the source"
            )
        progress.advance(original.entry.nbytes)


def _is_copy(original: TensorLocation, copy: TensorLocation, transforms: Transforms) -> bool:
    """Whether a tensor has the bytes of the source's, or a bias those of the transformed one."""
    there, here = original.entry, copy.entry
    if (there.dtype, there.shape) != (here.dtype, here.shape):
        return False
    if transforms.changes(original.name):
        expected = Original(original, transforms).read().float()
        found = copy.read().float()
        return torch.allclose(found, expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))
    return all(
        left == right
        for left, right in zip(
            read_pieces(original.path, there.begin, there.end),
            read_pieces(copy.path, here.begin, here.end),
            strict=True,
        )
    )
