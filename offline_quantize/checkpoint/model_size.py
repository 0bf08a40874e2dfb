"""The size of a whole model: what is packed of it, and what stays as it was."""

import dataclasses
from collections.abc import Iterable

from offline_quantize.checkpoint.safetensors_file import Entry


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Numbers of weights, and the bytes that they take.

    packed, packed_bytes:           those that are packed.
    unquantized, unquantized_bytes: elements of all other tensors.
    """

    packed: int
    packed_bytes: int
    unquantized: int
    unquantized_bytes: int

    @classmethod
    def of(cls, packed: int, packed_bytes: int, others: Iterable[Entry]) -> "ModelSize":
        """With the tensors that stay as they are."""
        entries = list(others)
        return cls(
            packed,
            packed_bytes,
            sum(entry.weights for entry in entries),
            sum(entry.nbytes for entry in entries),
        )

    @property
    def weights(self) -> int:
        """All of them."""
        return self.packed + self.unquantized

    @property
    def bits(self) -> float:
        """Effective bits per weight of the whole model."""
        return 8 * (self.packed_bytes + self.unquantized_bytes) / self.weights

    def share(self, weights: int) -> str:
        """So many weights in per cent of all."""
        return f"{100 * weights / self.weights:.1f} %"
