"""Folders that hold an adapter, such as LoRA, and no model: refused, with what to do instead."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from offline_quantize.checkpoint.atomic_files import read_json
from precalib_kernels.errors import SourceError

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of all tensors of PEFT
TENSOR = re.compile(
    r"(?:^|\.)(?:lora_(?:A|B|down|up|embedding_[AB]|magnitude_vector)|ia3_l|prompt_embeddings"
    r"|hada_w\d\w*|lokr_w\d\w*|oft_[rRsS]|vera_lambda_\w+)(?:\.|$)"
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
DEFAULT_RANK = 16  # of --max-lora-rank


def holds_only_adapter(directory: Path) -> bool:
    """Whether a folder has an adapter's configuration, and no weights but an adapter's."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return False
    return all(path.name.startswith("adapter_") for path in directory.glob("*.safetensors"))


def are_adapter_tensors(names: Iterable[str]) -> bool:
    """Whether all tensors of these names belong to an adapter; there is at least one."""
    listed = list(names)
    return bool(listed) and all(n.startswith(PREFIX) or TENSOR.search(n) for n in listed)


def refusal(directory: Path) -> SourceError:
    """What is wrong with the folder of an adapter, and how it is served with a packed model."""
    try:
        config = read_json(directory / ADAPTER_CONFIG, SourceError, "")
    except SourceError:
        config = {}
    kind, base = config.get("peft_type", "LORA"), config.get("base_model_name_or_path")
    named = f" ({base})" if isinstance(base, str) and base else ""
    if kind != "LORA":
        return SourceError(
            f"{directory}: is an adapter ({kind}), not a model; merge it into its base "
            f"model{named} and quantize the result, as vLLM serves no adapters but LoRA"
        )
    rank = config.get("r")
    more = ""
    if isinstance(rank, int) and rank > DEFAULT_RANK:
        fitting = next((r for r in RANKS if r >= rank), RANKS[-1])
        more = f" --max-lora-rank {fitting}"
    return SourceError(
        f"{directory}: is an adapter (LoRA), not a model; quantize its base model{named} and serve "
        f"both: vllm serve PACKED --enable-lora --lora-modules NAME={shlex.quote(str(directory))}"
        f"{more}"
    )
