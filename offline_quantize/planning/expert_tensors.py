"""Which 3-D tensors of a checkpoint hold experts, and what their matrices are.

Names and shapes tell most of it, but not whether rows of gate and up alternate; that is known of
model types. Experts of other model types stay unquantized.
"""

import re
from collections.abc import Mapping

from offline_quantize.checkpoint.safetensors_file import Entry
from precalib_kernels.format.expert_tensors import ExpertTensor

GATE_UP = re.compile(r"^(.*\.experts)\.gate_up_proj$")
GRANITE_IN = re.compile(r"^(.*\.block_sparse_moe)\.input_linear\.weight$")
LIKE_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)

SPLIT = ("gate_proj", "up_proj")  # rows of the gate come first
WHOLE = ("gate_up_proj",)  # rows of gate and up alternate, and stay so
# tests/vllm_precalib/experts/ serves a model of each
MODULES = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "llama4_text", "granitemoe"), SPLIT),
    "gpt_oss": WHOLE,
}
KEPT = "experts in a 3-D tensor"


def find_expert_tensors(
    entries: Mapping[str, Entry], model_type: str | None
) -> dict[str, ExpertTensor]:
    """What the 3-D tensors of experts are, by name, if the model type tells.

    entries:    of all tensors of the checkpoint, by name.
    model_type: of the language model.

    The two tensors of a layer are there together; their shapes tell which dimension is which.
    """
    modules = MODULES.get(model_type or "")
    if modules is None:
        return {}
    found: dict[str, ExpertTensor] = {}
    for name, entry in entries.items():
        if (match := GATE_UP.match(name)) is not None:
            prefix, other = match[1], f"{match[1]}.down_proj"
        elif (match := GRANITE_IN.match(name)) is not None:
            prefix, other = f"{match[1]}.experts", f"{match[1]}.output_linear.weight"
        else:
            continue
        down = entries.get(other)
        if down is None or len(entry.shape) != 3 or len(down.shape) != 3 or not entry.weights:
            continue
        transposed = _is_transposed(entry.shape, down.shape)
        if transposed is not None and _prefix_is_free(entries, prefix):
            found[name] = ExpertTensor(_three(entry.shape), prefix, modules, transposed)
            found[other] = ExpertTensor(_three(down.shape), prefix, ("down_proj",), transposed)
    return found


def is_like_experts(name: str, entry: Entry) -> bool:
    """Whether a tensor looks as if it held experts, known or not."""
    return len(entry.shape) == 3 and LIKE_EXPERTS.search(name) is not None and min(entry.shape) > 1


def _is_transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Whether inputs come first, of [E, 2·I, H] and [E, H, I], or [E, H, 2·I] and [E, I, H].

    None if the shapes are neither. They cannot be both.
    """
    experts, first, last = gate_up
    if (experts, last, first) == (down[0], down[1], 2 * down[2]):
        return False
    return True if (experts, first, last) == (down[0], down[2], 2 * down[1]) else None


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = shape
    return first, second, third


def _prefix_is_free(entries: Mapping[str, Entry], prefix: str) -> bool:
    """Whether the checkpoint has no experts with matrices of their own there as well."""
    return f"{prefix}.0.down_proj.weight" not in entries
