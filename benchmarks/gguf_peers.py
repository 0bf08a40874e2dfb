"""llama.cpp's own quantizer, from a libllama.so, without an importance matrix.

Blocks of 256 do not fit every input size; llama.cpp then falls back to types with blocks of 32 and
more bits. And a model that once was a GGUF file lies on grids of 32 inputs which such types find
again. So every type is made twice: as llama.cpp makes it, and with the inputs of each weight in
random order, which breaks such grids, and blocks that run on across the ends of rows, which fit
any size. Sizes are those of the file's tensors.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AS_MADE, SHUFFLED = "GGUF", "GGUF, inputs shuffled"
# names in llama.cpp's enum llama_ftype
TYPES = ("Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q4_0", "Q4_1")
SHUFFLED_TYPES = ("IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S")
BLOCK = 256
Found = tuple[dict[str, Tensor], dict[str, int]]  # weights and stored bits, by name


def make(library: Path, shuffled: bool, kind: str, source: Path) -> Found:
    """Quantize the decoder: its weights by name, and the bits that the file stores for each."""
    import gguf
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", framework="pt") as file:
        original = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = gguf_names(source, list(original))
    shape = {name: tensor.shape for name, tensor in original.items()}
    with tempfile.TemporaryDirectory() as work:
        plain, packed = Path(work) / "plain.gguf", Path(work) / "packed.gguf"
        given = {
            names[name]: _shuffle(tensor) if shuffled and _linear(name) else tensor
            for name, tensor in original.items()
        }
        write_gguf(plain, source, given)
        quantize(library, plain, packed, kind)
        made = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
        found, bits = {}, {}
        for name in filter(_linear, original):
            tensor = made[names[name]]
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            values = values.reshape(shape[name])
            order = _order(values.shape[1]).argsort()
            found[name] = (values[:, order] if shuffled else values).to(original[name].dtype)
            bits[name] = 8 * int(tensor.n_bytes)
    return {name: values.contiguous() for name, values in found.items()}, bits


def gguf_names(source: Path, names: list[str]) -> dict[str, str]:
    """What GGUF calls the tensors of a llama."""
    import gguf

    layers = _config(source).num_hidden_layers
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        translated = mapping.get_name(stem)
        if translated is None:
            raise ValueError(f"{name}: GGUF has no name for this tensor of a llama")
        found[name] = f"{translated}.{suffix}"
    return found


def write_gguf(path: Path, source: Path, tensors: dict[str, Tensor]) -> None:
    """Write a llama in float32. Rows of q and k stay in their order: it is for quantizing only."""
    import gguf

    config = _config(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(library: Path, plain: Path, packed: Path, kind: str) -> None:
    """Run the quantizer of a libllama.so."""
    import gguf

    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = Options
    options = llama.llama_model_quantize_default_params()
    options.threads = torch.get_num_threads()
    options.kind = gguf.LlamaFileType[f"MOSTLY_{kind}"]
    paths = str(plain).encode(), str(packed).encode()
    if llama.llama_model_quantize(*paths, ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot make {kind}")


class Options(ctypes.Structure):
    """The beginning of llama.cpp's llama_model_quantize_params, and room for the rest."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("rest", ctypes.c_byte * 504),
    )


def _linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _order(columns: int) -> Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(0))


def _shuffle(weight: Tensor) -> Tensor:
    return weight[:, _order(weight.shape[1])].reshape(-1, BLOCK)


def _config(source: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source)
