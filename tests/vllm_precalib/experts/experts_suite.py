"""Engines on tiny mixtures of experts: `python experts_suite.py SUITE FOLDER` writes results.json.

As engines_suite.py, but checkpoints are quantized by the quantizer, and dequantized for the truth.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines_suite as engines
import tiny
from engines_suite import DENSE, REFERENCE, answers, recorded, recording, reload, start, truth

from offline_quantize import dequantize_checkpoint, quantize_checkpoint

COMMON = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {  # vLLM's attention for it takes no smaller sizes
    "num_key_value_heads": 4,
    "moe_intermediate_size": 96,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, MIXTRAL),
    "granitemoe": (transformers.GraniteMoeConfig, MIXTRAL),
    "gpt_oss": (transformers.GptOssConfig, MIXTRAL | {"head_dim": 32}),
    "llama4": (
        transformers.Llama4TextConfig,
        MIXTRAL
        | {
            "num_experts_per_tok": 1,
            "head_dim": 32,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
        },
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        QWEN | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN | {"head_dim": 32, "norm_topk_prob": True}),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        {
            "head_dim": 32,
            "moe_intermediate_size": 96,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        DEEPSEEK | {"q_lora_rank": 32, "n_group": 2, "topk_group": 1},
    ),
}


def build(
    folder: Path,
    name: str,
    seed: int = 0,
    edit: Callable[[Path], None] | None = None,
    layers: int = 2,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **options: Any,
) -> tiny.Checkpoint:
    """A random model of the family, packed and unpacked again.

    edit: changes the folder of the unquantized one first. sizes: beyond those of the family.
    options: of `quantize_checkpoint`.
    """
    kind, fields = FAMILIES[name]
    torch.manual_seed(seed)
    config = kind(**{**COMMON, **fields, **sizes, "num_hidden_layers": layers})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
    source = folder / "source"
    model.save_pretrained(source)
    if name == "deepseek_v3":  # as the model's own file has it
        config_file = source / "config.json"
        text = config_file.read_text()
        config_file.write_text(text.replace("{", '{"topk_method": "noaux_tc",', 1))
    if edit:
        edit(source)
    settings = {"group_size": 32, "activations": "none", "jobs": 1, **options}
    quantize_checkpoint(source, folder / "packed", **settings)
    dequantize_checkpoint(folder / "packed", folder / "dense", dtype=torch.float32, jobs=1)
    return tiny.Checkpoint(folder / "packed", folder / "dense")


def stack(folder: Path) -> None:
    """Put experts with matrices of their own into 3-D tensors, as newer checkpoints have them."""
    tensors = load_file(file := folder / "model.safetensors")
    layers = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        found: dict[str, list[torch.Tensor]] = {}
        for expert in range(4):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                matrix = tensors.pop(f"{layer}.experts.{expert}.{leaf}.weight")
                found.setdefault(leaf, []).append(matrix)
        gate, up, down = (torch.stack(found[leaf]) for leaf in found)
        tensors[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{layer}.experts.down_proj"] = down
    save_file(tensors, file, {"format": "pt"})


def case(
    folder: Path, name: str, edit: Callable[[Path], None] | None = None, **options: Any
) -> dict[str, Any]:
    checkpoint = build(folder, name, edit=edit)
    llm = start(checkpoint.packed, **options)
    return {"first": (answers(llm), truth(checkpoint))}


def reloaded(folder: Path, name: str) -> dict[str, Any]:
    first, second = build(folder / "1", name, 1), build(folder / "2", name, 2)
    llm = start(first.packed, **recording(folder / "choices"))
    result = {"choices": recorded(folder / "choices"), "first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_mixtral(folder: Path) -> dict[str, Any]:
    return reloaded(folder, "mixtral")


def case_mixtral_dense(folder: Path) -> dict[str, Any]:
    return case(folder, "mixtral", **DENSE)


def case_mixtral_reference(folder: Path) -> dict[str, Any]:
    return case(folder, "mixtral", **REFERENCE)


def case_gpt_oss(folder: Path) -> dict[str, Any]:
    """Without a reload: vLLM 0.32 keeps this model's old experts and sinks, packed or not."""
    checkpoint = build(folder, "gpt_oss")
    llm = start(checkpoint.packed, **recording(folder / "choices"))
    return {"choices": recorded(folder / "choices"), "first": (answers(llm), truth(checkpoint))}


def case_gpt_oss_dense(folder: Path) -> dict[str, Any]:
    return case(folder, "gpt_oss", **DENSE)


def case_llama4(folder: Path) -> dict[str, Any]:
    return case(folder, "llama4")


def case_granitemoe(folder: Path) -> dict[str, Any]:
    return case(folder, "granitemoe")


def case_qwen2_moe(folder: Path) -> dict[str, Any]:
    return case(folder, "qwen2_moe")


def case_qwen3_moe(folder: Path) -> dict[str, Any]:
    return case(folder, "qwen3_moe", edit=stack)


def of_vllm(folder: Path, name: str) -> dict[str, Any]:
    """Answers beside those of vLLM on the unpacked model, in the one type its attention takes."""
    checkpoint = build(folder, name)
    served = answers(start(checkpoint.packed, dtype="bfloat16", **DENSE))
    return {"first": (served, answers(start(checkpoint.dense, dtype="bfloat16")))}


def case_deepseek_v2(folder: Path) -> dict[str, Any]:
    return of_vllm(folder, "deepseek_v2")


def case_deepseek_v3(folder: Path) -> dict[str, Any]:
    return of_vllm(folder, "deepseek_v3")


def case_lora(folder: Path) -> dict[str, Any]:
    """What the user reads who wants adapters."""
    checkpoint = build(folder, "mixtral")
    try:
        start(checkpoint.packed, enable_lora=True, max_lora_rank=8)
    except Exception as error:
        return {"text": f"{type(error).__name__}: {error}"}
    return {"text": "served"}


def case_online(folder: Path) -> dict[str, Any]:
    """Experts kept, and quantized by vLLM as it loads them; beside the same from the source."""
    checkpoint = build(folder, "qwen3_moe", keep=[r"\.experts\."])
    online = {"quantization_config": {"moe": "int8_per_channel_weight_only"}}
    found: dict[str, Any] = {"plain": answers(start(checkpoint.packed, dtype="bfloat16"))}
    try:
        found["online"] = answers(start(checkpoint.packed, dtype="bfloat16", **online))
    except NotImplementedError as error:
        found["refused"] = str(error)
    return found


def case_packed_at_load(folder: Path) -> dict[str, Any]:
    """Ordinary checkpoints; the truth is what vLLM answers on the same ones quantized before."""
    options = {"recipe": "balanced-3", "group_size": None}
    first, second = (build(folder / str(seed), "qwen3_moe", seed, **options) for seed in (1, 2))
    ours = {"additional_config": {"precalib": {"recipe": "balanced-3"}}}
    sources = [checkpoint.packed.parent / "source" for checkpoint in (first, second)]
    llm = start(sources[0], quantization="precalib", **ours)
    found = [answers(llm)]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(sources[1])})
    llm.reset_prefix_cache()
    found.append(answers(llm))
    truths = [answers(start(checkpoint.packed)) for checkpoint in (first, second)]
    return {"first": (found[0], truths[0]), "reloaded": (found[1], truths[1])}


def tensors_of_all_experts_packed_at_load(folder: Path, name: str) -> dict[str, Any]:
    wide = {"intermediate_size": 128}  # a whole group
    checkpoint = build(folder, name, sizes=wide, group_size=None)
    llm = start(folder / "source", quantization="precalib", **recording(folder / "choices"))
    choices = recorded(folder / "choices")
    return {"choices": choices, "first": (answers(llm), answers(start(checkpoint.packed)))}


def case_gpt_oss_packed_at_load(folder: Path) -> dict[str, Any]:
    """Experts with biases."""
    return tensors_of_all_experts_packed_at_load(folder, "gpt_oss")


def case_llama4_packed_at_load(folder: Path) -> dict[str, Any]:
    return tensors_of_all_experts_packed_at_load(folder, "llama4")


def case_compiled(folder: Path) -> dict[str, Any]:
    checkpoint = build(folder, "qwen3_moe")
    llm = start(checkpoint.packed, enforce_eager=False)
    return {
        "mode": llm.llm_engine.vllm_config.compilation_config.mode.name,
        "first": (answers(llm), truth(checkpoint)),
    }


def case_tensor_parallel(folder: Path) -> dict[str, Any]:
    return case(folder, "qwen3_moe", tensor_parallel_size=2)


def case_expert_parallel(folder: Path) -> dict[str, Any]:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    return case(folder, "mixtral", **parallel)


engines.SUITES = {
    "experts": [case_mixtral, case_gpt_oss, case_lora],
    "experts_families": [
        case_mixtral_dense,
        case_mixtral_reference,
        case_gpt_oss_dense,
        case_llama4,
        case_granitemoe,
        case_qwen2_moe,
        case_qwen3_moe,
        case_deepseek_v2,
        case_deepseek_v3,
        case_online,
        case_packed_at_load,
        case_gpt_oss_packed_at_load,
        case_llama4_packed_at_load,
    ],
    "experts_compiled": [case_compiled],
    "experts_parallel": [case_tensor_parallel, case_expert_parallel],
}

if __name__ == "__main__":
    engines.main(sys.argv[1], Path(sys.argv[2]))
