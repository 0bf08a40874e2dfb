"""`precalib inspect`: a packed checkpoint as a table, or as JSON."""

from typing import Any

from offline_quantize.checkpoint.atomic_files import CARD, MANIFEST
from offline_quantize.checkpoint.manifest import Manifest
from offline_quantize.checkpoint.packed import PackedCheckpoint, model_size
from offline_quantize.cli import console
from offline_quantize.planning.activation_options import describe, describe_tuning
from offline_quantize.units import natural


def show(packed: PackedCheckpoint, manifest: Manifest) -> None:
    """Print everything: tensors by layer, what stays as it is, totals of tensors and files."""
    console.show_tensors(manifest)
    console.show_unquantized(manifest.unquantized, manifest.skipped_files)
    known = describe(manifest.run.activations) if manifest.run.activations else "no forward pass"
    known += describe_tuning(manifest.run.tuned)
    console.out.print(
        f"Recipe {packed.config.recipe}, {known}, made by precalib {manifest.precalib}."
    )
    console.show_totals(manifest)
    console.show_model_size(model_size(packed, manifest))
    count, nbytes = _files(packed, manifest)
    console.out.print(f"{count:,} files, {console.size(nbytes)} in all.")


def contents(packed: PackedCheckpoint, manifest: Manifest) -> dict[str, Any]:
    """The same as JSON values; sizes are in bytes.

    The values of `tensors`, by module, are those of the manifest (`WeightRecord`).
    """
    fields = manifest.to_json()
    count, nbytes = _files(packed, manifest)
    whole = model_size(packed, manifest)
    return {
        "directory": str(packed.root),
        "recipe": packed.config.recipe,
        "activations": manifest.run.activations,
        "precalib": manifest.precalib,
        "format_version": manifest.format_version,
        "totals": {
            **fields["totals"],
            "bytes_before": manifest.bytes_before,
            "bytes_after": manifest.bytes_after,
            "weights_of_model": whole.weights,
            "bits_per_weight_of_model": whole.bits,
            "files": count,
            "file_bytes": nbytes,
        },
        "tensors": {module: fields["tensors"][module] for module in _in_order(manifest)},
        "kept": fields["kept"],
        "left_out": fields["left_out"],
    }


def _in_order(manifest: Manifest) -> list[str]:
    return sorted(manifest.tensors, key=natural)


def _files(packed: PackedCheckpoint, manifest: Manifest) -> tuple[int, int]:
    """Number of files and their bytes, with those that the manifest does not list."""
    others = {MANIFEST, CARD} - manifest.files.keys()
    sizes = [path.stat().st_size for name in others if (path := packed.root / name).exists()]
    sizes += [file.size for file in manifest.files.values()]
    return len(sizes), sum(sizes)
