"""Pack: codes and scales of a block of rows as the tensors of the file format."""

import torch
from torch import Tensor

from offline_quantize.method.codes import Codes
from offline_quantize.method.salience import SalientWeights
from offline_quantize.method.scales import GroupScales, RowScales
from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient


def pack_rows(
    codes: Codes,
    salient: SalientWeights,
    rows: RowScales,
    groups: GroupScales,
    layout: Layout,
    columns: int,
) -> dict[str, Tensor]:
    """Rows of every tensor of `Layout.tensors` but `column_scale`, by name.

    columns: K; codes of the padding beyond it are dropped.
    """
    packed = groups.tensors | rows.tensors
    if layout.salient_count:
        high = torch.where(salient.used, codes.salient >> layout.bits, 0).to(torch.uint8)
        packed["salient"] = pack_salient(salient.positions, high, layout)
    base = codes.base.flatten(1)[:, :columns]
    packed["qweight"] = pack_bits(base, layout.bits)
    return packed
