"""What is written into weight files: the jobs of a run, and how a worker carries one out."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from offline_quantize.checkpoint.safetensors_file import (
    Entry,
    TensorLocation,
    read_pieces,
    tensor_bytes,
    write_at,
)


@dataclasses.dataclass(frozen=True)
class WriteJob:
    """One source tensor on its way into a weight file.

    key:     name in the journal.
    outputs: tensors it becomes.
    nbytes:  source bytes, for the progress display.
    make:    computes the outputs and a report; None to copy the bytes of `origin`.
    """

    key: str
    file: str
    outputs: Sequence[str]
    nbytes: int
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]] | None = None
    origin: TensorLocation | None = None

    @classmethod
    def copy(cls, file: str, origin: TensorLocation) -> "WriteJob":
        """A tensor that keeps its name and bytes."""
        return cls(origin.name, file, [origin.name], origin.entry.nbytes, origin=origin)


@dataclasses.dataclass(frozen=True)
class Written:
    """What is known of a tensor whose bytes are in the file.

    sha256: of these bytes.
    report: what was measured; None if an earlier run wrote them.
    """

    sha256: str
    report: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class WriteTask:
    """A job and where its outputs go: all that a worker needs, in this process or elsewhere.

    path:   of the partial file, which is there already.
    places: of the outputs in it.
    before: digest of what an earlier run wrote there; None if it wrote nothing.
    """

    job: WriteJob
    path: Path
    places: Mapping[str, Entry]
    before: str | None

    def run(self, flags: int) -> Written:
        """Make and write the outputs, unless they are there; the same bytes at every call.

        flags: with which the file is opened for writing.

        Raises what `make` raises, and OSError if the file cannot be written.
        """
        if self.before is not None and self._stored() == self.before:
            return Written(self.before, None)
        sha256 = hashlib.sha256()
        report: dict[str, Any] = {}
        descriptor = os.open(self.path, os.O_WRONLY | flags)
        try:
            if self.job.make is None:
                assert self.job.origin is not None
                entry = self.job.origin.entry
                offset = self.places[self.job.outputs[0]].begin
                for piece in read_pieces(self.job.origin.path, entry.begin, entry.end):
                    write_at(descriptor, piece, offset)
                    sha256.update(piece)
                    offset += len(piece)
            else:
                tensors, report = self.job.make()
                for name in self.job.outputs:
                    data = tensor_bytes(tensors[name])
                    # of another size they would lie on the next tensor
                    assert len(data) == self.places[name].nbytes, name
                    write_at(descriptor, data, self.places[name].begin)
                    sha256.update(data)
        finally:
            os.close(descriptor)
        return Written(sha256.hexdigest(), report)

    def _stored(self) -> str:
        """Digest of the bytes that are there."""
        sha256 = hashlib.sha256()
        for name in self.job.outputs:
            place = self.places[name]
            for piece in read_pieces(self.path, place.begin, place.end):
                sha256.update(piece)
        return sha256.hexdigest()
