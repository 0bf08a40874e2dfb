"""The codebooks of the recipes with a trellis, as the quantizer writes them into a layout.

Entries are odd and symmetric; `offline_quantize.method.lloyd` computes them.
"""

_POSITIVE = {
    2: (11, 35, 61, 95),
    3: (5, 19, 29, 43, 57, 73, 91, 113),
    4: (3, 9, 15, 21, 29, 35, 41, 49, 55, 63, 71, 79, 87, 97, 109, 123),
    5: (
        *(1, 5, 7, 11, 13, 17, 19, 23, 25, 29, 33, 35, 39, 43, 45, 49),
        *(53, 55, 59, 63, 67, 71, 75, 79, 83, 87, 93, 97, 103, 109, 117, 125),
    ),
}

TRELLIS_CODEBOOKS = {  # by bits of a code, entries in ascending order
    bits: (*(-entry for entry in reversed(half)), *half) for bits, half in _POSITIVE.items()
}
