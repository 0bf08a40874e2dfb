"""docs/cpu-kernels.md names the kernels that the library dispatches to."""

import re

import pytest

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.toolchain.compile import BuildError


@pytest.mark.parametrize(
    ("codebook", "recipe"), [("not uniform", "balanced-4"), ("uniform", "rtn-4")]
)
def test_the_table_of_kernels(tables, codebook, recipe):
    page = {
        isa.strip("`"): [
            (int(first), None if more else int(last or first), kernel)
            for first, last, more, kernel in re.findall(
                r"(\d+)(?: – (\d+)|( and more))? `(\w+)`", kernels
            )
        ]
        for isa, kind, kernels in tables("cpu-kernels.md", "Which kernel runs")[0]
        if kind in (codebook, "both")
    }
    try:
        entries = library.kernel_table(X86Layout(RECIPES[recipe].layout, 4096, (4096,)))
    except BuildError as error:
        pytest.skip(str(error))
    found = {isa: [] for isa in page}
    for entry in entries:
        if entry.dtype == "bfloat16":
            found[entry.isa].append((entry.first_m, entry.last_m, entry.kernel))
    assert page == found
