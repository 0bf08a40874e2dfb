"""Matrices that lie in 3-D tensors of a file, read without the rest of the tensor."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from offline_quantize.checkpoint.safetensors_file import Entry, TensorLocation
from precalib_kernels.format.expert_tensors import ExpertTensor


@dataclasses.dataclass(frozen=True)
class TransposedEntry(Entry):
    """A matrix [N, K] that is stored as columns of a matrix [K, width].

    first: the first of its columns;  width: of the stored matrix, whose bytes are [begin, end).
    """

    first: int
    width: int

    @property
    def nbytes(self) -> int:
        """Size of the matrix itself."""
        return super().nbytes * self.shape[0] // self.width

    def arrange(self, elements: Tensor) -> Tensor:
        """The matrix in the order of its own rows."""
        rows, columns = self.shape
        stored = elements.view(columns, self.width)
        return stored[:, self.first : self.first + rows].T.contiguous()


def slice_entries(entry: Entry, tensor: ExpertTensor) -> dict[str, Entry]:
    """The matrices of a 3-D tensor of a file, by the name of the weight that each is."""
    outputs, inputs = tensor.outputs, tensor.inputs
    element = entry.nbytes // entry.weights
    size = outputs * inputs * element
    found: dict[str, Entry] = {}
    for part in tensor.parts():
        begin = entry.begin + part.expert * size
        if tensor.transposed:
            place = part.rows.start, outputs
            found[f"{part.module}.weight"] = TransposedEntry(
                entry.dtype, tensor.part_shape, begin, begin + size, *place
            )
        else:
            row = inputs * element
            start, stop = begin + part.rows.start * row, begin + part.rows.stop * row
            found[f"{part.module}.weight"] = Entry(entry.dtype, tensor.part_shape, start, stop)
    return found


def with_slices(
    locations: Mapping[str, TensorLocation], tensors: Mapping[str, ExpertTensor]
) -> dict[str, TensorLocation]:
    """`locations`, in which the 3-D tensors named give way to their matrices.

    Tensors that are not there, or have another shape, are left as they are.
    """
    found: dict[str, TensorLocation] = {}
    for name, location in locations.items():
        if name in tensors and location.entry.shape == tensors[name].shape:
            for part, entry in slice_entries(location.entry, tensors[name]).items():
                found[part] = TensorLocation(location.path, part, entry)
        else:
            found[name] = location
    return found
