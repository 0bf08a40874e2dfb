"""Add cases to the frozen vectors: `python tests/kernels/format/make_vectors.py RECIPE …`.

A case that is there never changes as long as its format version is read.
"""

import json
import sys
from pathlib import Path

import torch

from offline_quantize.method.encode import PreparedMatrix, encode_groups, prepare_rows
from offline_quantize.method.pack import pack_rows
from offline_quantize.method.recipes import RECIPES, adjust
from precalib_kernels.format import reference
from precalib_kernels.format.layout import FORMAT_VERSION
from precalib_kernels.format.salient_index import unpack_salient

ROWS, COLUMNS = 2, 96


def main() -> None:
    weight = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    path = Path(__file__).parent / "vectors" / f"version-{FORMAT_VERSION}.json"
    cases = json.loads(path.read_text()) if path.exists() else []
    for name in sys.argv[1:]:
        small = adjust(RECIPES[name], group_size=64)
        layout = small.layout
        scale = torch.linspace(0.5, 2, COLUMNS).half().float()[None]
        scale = scale if layout.column_scale else None
        matrix = PreparedMatrix(scale, penalty=2.5, largest=float(weight.abs().max()))
        rows = prepare_rows(weight, matrix, small)
        groups = encode_groups(rows, small)
        packed = pack_rows(groups.codes, rows.salient, rows.scales, groups.scales, layout, COLUMNS)
        if scale is not None:
            packed["column_scale"] = scale.half()
        tensors = {name: packed[name] for name in layout.tensors(ROWS, COLUMNS)}
        case = {
            "layout": layout.to_dict(),
            "shape": [ROWS, COLUMNS],
            "tensors": {
                name: tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()
                for name, tensor in tensors.items()
            },
            "values": [
                float(v).hex() for v in reference.dequantize(tensors, layout, COLUMNS).flatten()
            ],
        }
        if layout.salient_count:
            positions, _ = unpack_salient(tensors["salient"], layout, COLUMNS, "vector")
            case["positions"] = positions.tolist()
        cases.append(case)
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
