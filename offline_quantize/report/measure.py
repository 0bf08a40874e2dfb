"""Where the salient weights of a packed weight are, and how its values are spread."""

import dataclasses

import torch
from torch import Tensor

from offline_quantize.checkpoint.packed import PackedCheckpoint
from offline_quantize.checkpoint.transforms import Original
from offline_quantize.method.weight_statistics import errors_agree, relative_error
from precalib_kernels.errors import SourceError
from precalib_kernels.format.salient_index import unpack_salient

BLOCK_WEIGHTS = 1 << 20
MAP_ROWS, MAP_COLUMNS = 32, 64  # at most
BINS = 96


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the salient weights of a weight [N, K] are.

    columns: number in every column, int64 [K].
    blocks:  share of each block of the matrix, float64 [at most 32, at most 64].
    """

    columns: Tensor
    blocks: Tensor

    def busiest(self, share: float = 0.01) -> float:
        """Share of the salient weights that the busiest columns hold; `share` if all are equal."""
        count = max(1, round(share * len(self.columns)))
        total = int(self.columns.sum())
        return int(self.columns.topk(count).values.sum()) / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Number of weights in 96 equal bins over ± `largest`, int64 [96], by class.

    The original counts are None where the original is not at hand. Classes are those of the
    packed weight, before and after.
    """

    largest: float
    non_salient: Tensor
    salient: Tensor
    original_non_salient: Tensor | None
    original_salient: Tensor | None


def positions(packed: PackedCheckpoint, module: str) -> Positions | None:
    """Where a packed weight's salient weights are; None for a layout without any."""
    layout, (rows, columns) = packed.layout(module), packed.shape(module)
    if not layout.salient_count:
        return None
    stored = packed.tensors(module)["salient"]
    down, across = min(rows, MAP_ROWS), min(columns, MAP_COLUMNS)
    per_column = torch.zeros(columns, dtype=torch.int64)
    blocks = torch.zeros(down * across, dtype=torch.int64)
    block_of_row, block_of_column = _block_of(rows, down), _block_of(columns, across)
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        row, column = _places(packed, module, stored[start : start + step])
        per_column += torch.bincount(column, minlength=columns)
        index = block_of_row[row + start] * across + block_of_column[column]
        blocks += torch.bincount(index, minlength=down * across)
    sizes = torch.outer(block_of_row.bincount(), block_of_column.bincount())
    return Positions(per_column, blocks.view(down, across) / sizes)


def histogram(
    packed: PackedCheckpoint, module: str, origin: Original | None, recorded: float
) -> Histogram:
    """Spread of a packed weight's values, beside that of its original where there is one.

    recorded: the relative error in the manifest.

    Raises SourceError when the error against the original is not the recorded one.
    """
    weight = packed.weight(module)
    salient = torch.zeros(weight.shape, dtype=torch.bool)
    if packed.layout(module).salient_count:
        salient[_places(packed, module, packed.tensors(module)["salient"])] = True
    if origin is None:
        largest = _largest(weight)
        return Histogram(largest, *_classes(weight, salient, largest), None, None)
    original = origin.read().float()
    _refuse_other(f"{packed.root}: {module}", original, weight, recorded)
    largest = _largest(original)
    return Histogram(
        largest, *_classes(weight, salient, largest), *_classes(original, salient, largest)
    )


def _places(packed: PackedCheckpoint, module: str, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (int64) of every salient weight in some rows of the tensor `salient`."""
    layout, (_, columns) = packed.layout(module), packed.shape(module)
    found, _ = unpack_salient(stored, layout, columns, f"{packed.root}: {module}")
    first = torch.arange(found.shape[1])[:, None] * layout.group_size
    used = found >= 0
    row = torch.arange(len(found))[:, None, None].expand(found.shape)[used]
    return row, (found + first)[used]


def _block_of(size: int, blocks: int) -> Tensor:
    """Block of each of `size` rows or columns, cut as evenly as can be."""
    return torch.arange(size) * blocks // size


def _largest(weight: Tensor) -> float:
    return float(weight.abs().max()) or 1.0


def _classes(weight: Tensor, salient: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Histograms of the non-salient and of the salient weights."""

    def counts(values: Tensor) -> Tensor:  # a quantized value can lie just past the largest
        return torch.histc(values.clamp_(-largest, largest), BINS, -largest, largest).long()

    return counts(weight[~salient]), counts(weight[salient])


def _refuse_other(where: str, original: Tensor, weight: Tensor, recorded: float) -> None:
    error = relative_error(original, weight)
    if not errors_agree(error, recorded):
        raise SourceError(
            f"{where}: relative error {error:.6g} against this source instead of the recorded "
            f"{recorded:.6g}; give --against the checkpoint that was quantized"
        )
