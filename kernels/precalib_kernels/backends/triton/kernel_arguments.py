"""Arguments of the kernels that come from a weight's arrays, and how activations are cut up."""

from collections.abc import Mapping

from torch import Tensor

from precalib_kernels.backends.routes import Grouping


def prepare_blocks(block_m: int, columns: int) -> tuple[int, int]:
    """Columns that one program makes ready, and those it takes at a time for the maximum.

    Few rows of x are cut into many programs, as each only waits for memory.
    """
    row_block = min(8192, 1 << (columns - 1).bit_length())
    return min(1024 if block_m <= 16 else 4096, max(128, row_block)), row_block


def array_arguments(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernel arguments; an array that a form does not have is never read, any pointer will do."""
    absent = arrays["qweight"]
    return {
        "words": arrays["qweight"],
        "group_data": arrays["group_data"],
        "positions": arrays.get("salient_positions", absent),
        "values": arrays.get("salient_values", absent),
        "affine": arrays.get("salient_affine", absent),
        "row_unit": arrays["row_unit"],
        "salient_unit": arrays.get("salient_unit", absent),
        "table": arrays["table"],
        "constants": arrays["constants"],
        "tiles": arrays["tiles"],
    }


def routing_arguments(grouping: Grouping | None, anything: Tensor) -> dict[str, Tensor]:
    """Kernel arguments; those that are not there are never read, any pointer will do."""
    if grouping is None:
        return dict.fromkeys(("routes", "expert_ids", "used", "factors"), anything)
    routes, factors = grouping.routes, grouping.factors
    return {
        "routes": routes.sorted,
        "expert_ids": routes.expert_ids,
        "used": routes.used,
        "factors": anything if factors is None else factors,
    }
