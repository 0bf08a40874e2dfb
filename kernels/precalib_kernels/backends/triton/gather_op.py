"""`precalib::gpu_gather_rows`: the typed function and the implementation."""

import torch
from torch import Tensor

from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.kernel_arguments import array_arguments
from precalib_kernels.backends.triton.memory_layout import triton_layout
from precalib_kernels.format.layout import Layout
from precalib_kernels.ops import check_ids, named_arrays

BLOCK_IDS = 8  # of a program
# With assertions, but without those that integers overflow.
GATHER_OPTIONS = {"num_warps": 1, "num_stages": 1, "debug": True, "sanitize_overflow": False}


def gpu_gather_rows(
    ids: Tensor,
    packed: list[Tensor],
    input_size: int,
    outputs: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """`precalib::gpu_gather_rows`: rows of Ŵ by number, [..., input_size] in `dtype`.

    ids:     [...] int64. One that is no row is caught as torch catches it: by an assertion on the
             device, after which nothing more can be computed there.
    packed:  as `repack` gives them, in the order of `array_order`, for a weight of one part.
    outputs: N.
    """
    result: Tensor = torch.ops.precalib.gpu_gather_rows(
        ids, packed, input_size, outputs, layout, dtype
    )
    return result


def _gpu_gather_rows(
    ids: Tensor, packed: list[Tensor], input_size: int, outputs: int, layout: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from precalib_kernels.backends.triton.gather_kernel import gather_kernel

    parsed = Layout.from_text(layout)
    arrays = named_arrays(packed, input_size, [outputs], parsed)
    check_ids(ids)
    form, flat = triton_layout(parsed), ids.flatten()
    count = flat.numel()
    rows = packed[0].new_empty((count, input_size), dtype=dtype)
    steps, _, padded_rows, _ = arrays["qweight"].shape
    if not ids.is_cuda and bool(((flat < 0) | (flat >= outputs)).any()):
        raise IndexError(f"ids from {flat.min()} to {flat.max()} for rows 0 to {outputs - 1}")
    arguments = array_arguments(arrays)
    del arguments["tiles"]
    if count:
        gather_kernel[(-(-count // BLOCK_IDS), steps)](
            rows, flat, **arguments, column_scale=arrays.get("column_scale", rows),
            count=count, outputs=outputs, columns=input_size, padded_rows=padded_rows,
            SCALED=parsed.column_scale, ENTRIES_PER_UNIT=form.entries_per_unit, BLOCK=BLOCK_IDS,
            **GATHER_OPTIONS, **op.specialization(form),
        )  # fmt: skip
    return rows.view(*ids.shape, input_size)


# for every device: under Triton's interpreter kernels run on the CPU
torch.library.register_kernel("precalib::gpu_gather_rows", None, _gpu_gather_rows)
