"""Models of transformers: an original checkpoint, and a packed one."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import read_json
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.source import (
    CONFIG,
    DOWNLOAD_REMEDY,
    check_suitable,
    open_checkpoint,
)
from precalib_kernels.errors import PrecalibError, SourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Any of them is enough for one kind of tokenizer or another.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
INSTALL_REMEDY = (
    "running a model needs transformers; install it with: pip install 'vllm-precalib[eval]'"
)


def load_original(
    directory: Path,
    dtype: torch.dtype,
    device: str,
    placement: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """The model of an unpacked checkpoint, for inference.

    placement: options of transformers that say where each part goes, in place of `device`.

    Raises SourceError for a checkpoint that is quantized already or that transformers cannot load
    whole, and UsageError when transformers is missing.
    """
    check_suitable(open_checkpoint(directory))
    return _load(directory, None, dtype, device, placement)


def load_packed(directory: Path, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """The model of a packed checkpoint, its weights as the reference dequantizes them.

    Raises UsageError when transformers is missing, SourceError when it cannot load the whole
    checkpoint, and what `open_packed` raises.
    """
    packed = open_packed(directory)
    replaced = {name for module in packed.config.modules for name in packed.stored_names(module)}
    tensors = {
        f"{module}.weight": packed.weight(module).to(dtype)
        for module in packed.config.modules
        if module not in packed.in_expert_tensors
    }
    for name in packed.config.expert_tensors:
        tensors[name] = packed.expert_tensor(name, dtype)
    for name, location in packed.locations.items():
        if name not in replaced:
            tensors[name] = location.read()
    return _load(directory, tensors, dtype, device)


def empty_model(directory: Path) -> "PreTrainedModel":
    """The model that a checkpoint's configuration describes, its parameters without values.

    Raises SourceError when transformers has no such model, UsageError when it is missing.
    """
    _require_transformers()
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    values = read_json(directory / CONFIG, SourceError, DOWNLOAD_REMEDY)
    _refuse_hub_kernels(directory, values)
    if values.get("auto_map") and values.get("model_type") not in CONFIG_MAPPING:
        raise _own_code(directory, values)  # transformers might ask whether to run it
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        auto_model: Any = AutoModelForCausalLM
        kind = type(config)
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto_model = AutoModelForImageTextToText
        with torch.device("meta"):
            model: PreTrainedModel = auto_model.from_config(config, trust_remote_code=False)
        return model
    except KeyError as error:
        raise SourceError(f"{directory}: transformers has no model type {error}") from error
    except Exception as error:  # of any model class: all the same here
        if "custom code" in str(error):
            raise _own_code(directory, values) from error
        raise SourceError(f"{directory}: transformers cannot load it ({_line(error)})") from error


@contextlib.contextmanager
def errors_of_the_model(root: Path, remedy: str) -> Iterator[None]:
    """Whatever a model class raises while it computes, as one sentence: a SourceError."""
    try:
        yield
    except PrecalibError:
        raise
    except Exception as error:  # of any model class: all the same here
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise SourceError(f"{root}: the model cannot be run ({reason}); {remedy}") from error


def input_device(model: "PreTrainedModel") -> torch.device:
    """Where a model takes its tokens; the CPU for one whose embeddings are read from disk."""
    device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def _refuse_hub_kernels(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise SourceError for code of the hub that transformers would load as a kernel."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _refuse_hub_kernels(directory, value)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise SourceError(
                f"{directory / CONFIG}: asks for code of the hub ({name} is '{value}'), which is "
                "not run; remove that entry"
            )


def _own_code(directory: Path, config: Mapping[str, Any]) -> SourceError:
    """Refusal of a model that transformers knows by code of the checkpoint only."""
    classes = config.get("auto_map")
    names = sorted(map(str, classes.values())) if isinstance(classes, Mapping) else [str(classes)]
    return SourceError(
        f"{directory / CONFIG}: the model needs code that comes with the checkpoint "
        f"({', '.join(names)[:120]}), which precalib never runs; such a model can be "
        "quantized, but not be evaluated or observed"
    )


def check_tokenizer(directory: Path) -> None:
    """Raise SourceError for a checkpoint without files of a tokenizer; nothing is loaded."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise SourceError(
            f"{directory}: holds no tokenizer ({TOKENIZER_FILES[0]} or another file of one); copy "
            "the tokenizer's files of the original model there"
        )


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The checkpoint's tokenizer.

    Raises SourceError when none can be loaded, UsageError when transformers is missing.
    """
    check_tokenizer(directory)
    _require_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of any tokenizer library: all the same here
        if "custom code" in str(error):
            raise SourceError(
                f"{directory}: its tokenizer needs code that comes with the checkpoint, which "
                "precalib never runs; give no text and no tasks"
            ) from error
        raise SourceError(f"{directory}: no tokenizer can be loaded ({_line(error)})") from error


def bos_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before every text: the token that begins a sequence, or nothing."""
    added: list[int] = tokenizer("").input_ids
    return added[:1] if added[:1] == [tokenizer.bos_token_id] else []


def versions() -> dict[str, str]:
    """Versions of the libraries that compute the probabilities."""
    _require_transformers()
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _load(
    directory: Path,
    tensors: dict[str, Tensor] | None,
    dtype: torch.dtype,
    device: str,
    placement: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """The model with the checkpoint's own tensors, or with other ones of the same names."""
    empty = empty_model(directory)
    kind: Any = type(empty)
    try:
        model, report = kind.from_pretrained(
            directory if tensors is None else None,
            config=empty.config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            **(placement or {}),
        )
        if absent := sorted(report["missing_keys"]):  # transformers would make up random values
            raise SourceError(
                f"{directory}: tensor '{absent[0]}' is missing; is it a whole checkpoint of "
                f"{kind.__name__}?"
            )
        loaded: PreTrainedModel = model.eval() if placement else model.eval().to(device)
        return loaded
    except PrecalibError:
        raise
    except Exception as error:  # of any model class: all the same here
        raise SourceError(f"{directory}: transformers cannot load it ({_line(error)})") from error


def _require_transformers() -> None:
    try:
        from transformers.utils import logging as module
    except ImportError as error:
        raise UsageError(INSTALL_REMEDY) from error
    settings: Any = module  # it has no types
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells of parts that stay on disk


def _line(error: Exception) -> str:
    """The first line of an error's text, and the second where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announces = bool(lines) and lines[0].endswith(":")
    return " ".join(lines[: 2 if announces else 1]) or type(error).__name__
