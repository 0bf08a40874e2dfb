"""The manifest of a packed checkpoint, precalib.json: what was made, from what, and how well."""

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    field_validator,
    model_serializer,
)

from offline_quantize.checkpoint.atomic_files import MANIFEST
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.records import FileName, Record, read_record
from offline_quantize.checkpoint.safetensors_file import TORCH_DTYPES, read_pieces
from precalib_kernels.errors import FormatError

REQUANTIZE_REMEDY = "quantize the model again"


class RunRecord(Record):
    """What a run was: everything its output depends on, but not where and when it ran.

    precalib:  version of the writer; None for writers that did not record it.
    recipe:    the main recipe and its adjustments, as on the command line.
    recipes:   JSON form of every recipe in use, by label.
    overrides: "REGEX=RECIPE";  keep: patterns;  head: recipe of the output head, or None.
    embeddings: recipe of the input embeddings; None for none, and then not written.
    activations: `ActivationOptions.to_json` of what went through the model first, or None.
    transform: of weights before they are quantized; None for none, and then not written.
    tuned:     "tokens" that scales were tuned on; None, and then not written, if they were not.
    source:    digest of config.json; size and digest of the header of every weight file.
    """

    # Fields of other writers take part in the comparison of two runs.
    model_config = ConfigDict(extra="allow")

    format_version: int
    precalib: str | None = None
    recipe: str
    recipes: dict[str, Any] = Field(default_factory=dict)
    overrides: list[str]
    keep: list[str]
    head: str | None = None
    embeddings: str | None = None
    activations: dict[str, Any] | None = None
    transform: str | None = None
    tuned: dict[str, int] | None = None
    source: dict[FileName, Any]

    @field_validator("activations")
    @classmethod
    def _has_what_is_shown(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse a record that does not say what `describe` tells people."""
        if value is not None:
            kinds = {"tokens": int, "text": str, "feedback": bool}
            if any(type(value.get(name)) is not kind for name, kind in kinds.items()):
                raise ValueError("lacks tokens, text or feedback")
            if value["text"] not in ("random", "self", "file"):
                raise ValueError(f"text {value['text'][:40]!r} is of no known kind")
        return value

    @field_validator("tuned")
    @classmethod
    def _has_tokens(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        """Refuse a record that does not say what `describe_tuning` tells people."""
        if value is not None and "tokens" not in value:
            raise ValueError("lacks tokens")
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields; of those that earlier writers did not know only the ones in use."""
        fields: dict[str, Any] = write(self)
        later = "transform", "embeddings", "tuned"
        return {k: v for k, v in fields.items() if k not in later or v is not None}


Count = Annotated[int, Field(ge=0, le=1 << 62)]


class Totals(Record):
    """Sums over all quantized weights.

    weights:              number of weights.
    source_bytes:         their size before;  stored_bytes: of all that replaces them.
    unquantized_bytes:    size of the tensors that stay as they are.
    bits_per_weight:      effective bits: all stored bytes counted.
    eq13_bits_per_weight: average bits by Eq. 13 of the paper.
    mean_relative_error:  ‖W − Ŵ‖² / ‖W‖² of each matrix, averaged over the weights.
    salient_overflow:     weights above λ' that found no place in their group.
    """

    weights: Count
    source_bytes: Count
    stored_bytes: Count
    unquantized_bytes: Count = Field(
        validation_alias="kept_bytes", serialization_alias="kept_bytes"
    )
    bits_per_weight: float
    eq13_bits_per_weight: float
    mean_relative_error: float
    salient_overflow: Count


class FileRecord(Record):
    """Size in bytes and sha256 (hexadecimal) of a file."""

    size: Count
    sha256: str


class WeightRecord(Record):
    """One quantized weight.

    file:           weight file that it is in.
    origin:         source tensor; None for writers that only knew "MODULE.weight".
    shape:          [N, K] of the weight;  dtype: its safetensors type in the source.
    recipe:         label of its recipe.
    The other fields are those of `Statistics.summary`.
    """

    file: FileName
    origin: str | None = None
    shape: Annotated[tuple[Count, Count], Strict(False)]  # a list in JSON
    dtype: str
    recipe: str
    bits_per_weight: float
    relative_error: float
    kl: float
    entropy_before: float
    entropy_after: float
    salient_share: float
    salient_overflow: Count


class Manifest(Record):
    """Everything that precalib.json holds.

    precalib:      version of the writer.
    run:           the run that made it.
    files:         every other file of the checkpoint, by name.
    tensors:       every quantized weight, by module.
    unquantized:   why each other tensor stays as it is, by name.
    skipped_files: files of the source that were not copied.
    """

    ENTRIES: ClassVar = {"files": "file", "tensors": "module"}

    format_version: int
    precalib: str
    run: RunRecord = Field(validation_alias="job", serialization_alias="job")
    totals: Totals
    files: dict[FileName, FileRecord]
    tensors: dict[str, WeightRecord]
    unquantized: dict[str, str] = Field(validation_alias="kept", serialization_alias="kept")
    skipped_files: list[FileName] = Field(
        validation_alias="left_out", serialization_alias="left_out"
    )

    @property
    def bytes_before(self) -> int:
        """Size of all tensors in the source; a head that was made of embeddings is none of them."""
        return self.totals.unquantized_bytes + sum(
            math.prod(weight.shape) * TORCH_DTYPES[weight.dtype].itemsize
            for module, weight in self.tensors.items()
            if weight.dtype in TORCH_DTYPES and self.origin_of(module) == f"{module}.weight"
        )

    @property
    def bytes_after(self) -> int:
        """Size of all tensors that were written."""
        return self.totals.unquantized_bytes + self.totals.stored_bytes

    def origin_of(self, module: str) -> str:
        """The tensor of the source that a packed module was made from."""
        weight = self.tensors.get(module)
        return (weight.origin if weight else None) or f"{module}.weight"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a packed checkpoint. Raises FormatError when missing or damaged."""
    return read_record(directory / MANIFEST, Manifest, FormatError, REQUANTIZE_REMEDY)


def record_file(path: Path, progress: Progress) -> FileRecord:
    """Size and sha256 of a file, which is read once."""
    progress.begin(f"sha256 of {path.name}")
    sha256, size = hashlib.sha256(), 0
    for piece in read_pieces(path):
        sha256.update(piece)
        size += len(piece)
        progress.advance(len(piece))
    return FileRecord(size=size, sha256=sha256.hexdigest())
