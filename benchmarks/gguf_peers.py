"""llama.cpp's own quantizer, from a libllama.so, without and with an importance matrix.

Blocks of 256 do not fit every input size; llama.cpp then falls back to types with blocks of 32 and
more bits. And a model that once was a GGUF file lies on grids which such types find again. So
types are made with the inputs of each weight in random order, too, which breaks such grids, and
blocks that run on across the ends of rows, which fit any size. Sizes are those of the file's
tensors.

The importance matrix is llama.cpp's: of every input of a weight the mean square over a text.
"""

import ctypes
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from calibration_text import evenly_spread
from torch import Tensor

AS_MADE, SHUFFLED = "GGUF", "GGUF, inputs shuffled"
WITH_MATRIX = "GGUF, importance matrix, inputs shuffled"
# names in llama.cpp's enum llama_ftype
TYPES = ("Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q4_0", "Q4_1")
SHUFFLED_TYPES = ("IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S")
MATRIX_TYPES = (
    "IQ2_XS",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K_M",
    "IQ4_XS",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
)
METHODS = {AS_MADE: TYPES, SHUFFLED: SHUFFLED_TYPES, WITH_MATRIX: MATRIX_TYPES}
WINDOWS = 32  # of 512 tokens, for the importance matrix
BLOCK = 256
VOCABULARY = 256  # rows of the embedding that are written: only linear weights are looked at
FLOAT32 = 0  # in enum ggml_type
# architecture in transformers' config: name in GGUF
ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}
Found = tuple[dict[str, Tensor], dict[str, int]]  # weights and stored bits, by name


def make(
    library: Path, method: str, kind: str, source: Path, calibration: Path | None = None
) -> Found:
    """Quantize the decoder: its weights by name, and the bits that the file stores for each."""
    import gguf
    from safetensors import safe_open

    shuffled = method != AS_MADE
    with safe_open(source / "model.safetensors", framework="pt") as file:
        original = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = gguf_names(source, list(original))
    inputs = mean_squares(source, calibration) if calibration else {}
    matrix = {
        names[name]: shuffle_row(squares, original[name].shape[0])
        for name, squares in inputs.items()
    }
    with tempfile.TemporaryDirectory() as work:
        plain, packed = Path(work) / "plain.gguf", Path(work) / "packed.gguf"
        given = {}
        for name, tensor in original.items():
            if _linear(name):
                given[names[name]] = shuffle(tensor) if shuffled else tensor
            else:
                given[names[name]] = tensor[:VOCABULARY] if tensor.ndim == 2 else tensor
        write_gguf(plain, source, given)
        quantize(library, plain, packed, kind, matrix)
        made = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
        found, bits = {}, {}
        for name in filter(_linear, original):
            tensor = made[names[name]]
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            values = values.reshape(original[name].shape)
            order = _order(values.shape[1]).argsort()
            found[name] = (values[:, order] if shuffled else values).to(original[name].dtype)
            bits[name] = 8 * int(tensor.n_bytes)
    return {name: values.contiguous() for name, values in found.items()}, bits


def gguf_names(source: Path, names: list[str]) -> dict[str, str]:
    """What GGUF calls a model's tensors. Raises ValueError for one that it has no name for."""
    import gguf

    architecture = _architecture(source)
    number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    mapping = gguf.get_tensor_name_map(number, _config(source).num_hidden_layers)
    found = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        translated = mapping.get_name(stem)
        if translated is None:
            raise ValueError(f"{name}: GGUF has no name for this tensor of a {architecture}")
        found[name] = f"{translated}.{suffix}"
    return found


def write_gguf(path: Path, source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model in float32, for quantizing only: a llama's rows of q and k keep their order."""
    import gguf

    config = _config(source)
    writer = gguf.GGUFWriter(path, _architecture(source))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(
    library: Path, plain: Path, packed: Path, kind: str, matrix: Mapping[str, Tensor]
) -> None:
    """Run the quantizer of a libllama.so; matrix: importance of a row's values, by GGUF's names."""
    import gguf

    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = Options
    options = llama.llama_model_quantize_default_params()
    options.threads = torch.get_num_threads()
    options.kind = gguf.LlamaFileType[f"MOSTLY_{kind}"]
    options.embedding_kind = FLOAT32
    rows = {name: values.float().contiguous().numpy() for name, values in matrix.items()}
    entries = [
        Importance(name.encode(), values.ctypes.data, values.size) for name, values in rows.items()
    ]
    if entries:
        options.matrix = (Importance * (len(entries) + 1))(*entries)  # the last one is empty
    paths = str(plain).encode(), str(packed).encode()
    if llama.llama_model_quantize(*paths, ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot make {kind}")


class Importance(ctypes.Structure):
    """llama.cpp's llama_model_imatrix_data: the importance of a tensor's inputs."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("values", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    )


class Options(ctypes.Structure):
    """The beginning of llama.cpp's llama_model_quantize_params, and room for the rest."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("output_kind", ctypes.c_int32),
        ("embedding_kind", ctypes.c_int32),
        ("flags", ctypes.c_bool * 8),
        ("matrix", ctypes.POINTER(Importance)),
        ("rest", ctypes.c_byte * 480),
    )


@torch.inference_mode()
def mean_squares(source: Path, calibration: Path) -> dict[str, Tensor]:
    """Of every input of each linear weight the mean square over a text, float32 [K], by name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    windows = evenly_spread(AutoTokenizer.from_pretrained(source), calibration.read_text(), WINDOWS)
    found: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().mean(0) / len(windows)
        found[name] = found.get(name, 0) + squares.float()

    for name, module in model.named_modules():
        if _linear(f"{name}.weight"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=f"{name}.weight": add(name, inputs[0])
            )
    for window in windows:
        model.model(torch.tensor([window]))
    return found


def shuffle(weight: Tensor) -> Tensor:
    """Inputs in random order, and so many rows [N, K] in one that blocks fit."""
    rows = _rows(*weight.shape)
    return weight[:, _order(weight.shape[1])].reshape(-1, rows * weight.shape[1])


def shuffle_row(values: Tensor, rows: int) -> Tensor:
    """What belongs to the inputs [K] of a weight with so many rows, in the order of `shuffle`."""
    return values[_order(len(values))].repeat(_rows(rows, len(values)))


def _rows(rows: int, columns: int) -> int:
    count = math.lcm(columns, BLOCK) // columns
    if rows % count:
        raise ValueError(f"a weight [{rows}, {columns}] cannot be cut into blocks of {BLOCK}")
    return count


def _linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _order(columns: int) -> Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(0))


def _config(source: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source)


def _architecture(source: Path) -> str:
    kind = _config(source).model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"{source}: no GGUF file is written for a {kind}")
    return ARCHITECTURES[kind]
