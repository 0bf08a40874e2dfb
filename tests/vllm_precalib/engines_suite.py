"""Engines on tiny checkpoints: `python engines_suite.py SUITE FOLDER` writes results.json.

Every case returns the answers of vLLM next to the truth, which is transformers in float32 on the
weights as the reference unpacks them; the tests compare. One process runs many cases because
starting one takes longer than all of its engines.
"""

import asyncio
import gc
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from safetensors.torch import save_file
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from offline_quantize import dequantize_checkpoint, quantize_checkpoint
from precalib_kernels.backends.x86 import library

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # as pyproject.toml does for pytest
import tiny

RELEASED = Path(__file__).parents[1] / "upgrade" / "checkpoints"
PROMPTS = [[5, 17, 101, 44, 3, 150], [199, 1, 64], list(range(20, 70))]
TOKENS = 8
DENSE = {"additional_config": {"precalib": {"backend": "dense"}}}
INT8 = {"additional_config": {"precalib": {"activations": "int8"}}}
KEPT = ["k_proj|q_proj|v_proj"]
REFERENCE = {"additional_config": {"precalib": {"backend": "reference"}}}

Answers = list[list[tuple[int, float]]]  # per prompt, greedy tokens with their log-probability


SIZES: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "dtype": "float32",
    "skip_tokenizer_init": True,
}
# This vLLM for CPUs makes room for what pipeline stages exchange only when it warms a compiled
# model up; the compiler does nothing here.
WARMED_UP = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
GREEDY = vllm.SamplingParams(
    temperature=0, max_tokens=TOKENS, logprobs=1, detokenize=False, ignore_eos=True
)


def start(path: Path, **options: Any) -> vllm.LLM:
    """A small eager float32 engine."""
    return vllm.LLM(str(path), **{**SIZES, **options})


def answers(llm: vllm.LLM, texts: list[list[int]] = PROMPTS, **options: Any) -> Answers:
    prompts = [{"prompt_token_ids": prompt} for prompt in texts]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, **options)
    return [
        [(t, step[t].logprob) for t, step in zip(o.token_ids, o.logprobs, strict=True)]
        for output in outputs
        for o in output.outputs
    ]


def truth(
    checkpoint: tiny.Checkpoint,
    edit: Callable[[Any], None] | None = None,
    texts: list[list[int]] = PROMPTS,
) -> Answers:
    """`edit` changes the model first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.dense, dtype=torch.float32)
    if edit:
        edit(model)
    result = []
    for prompt in texts:
        ids, steps = torch.tensor([prompt]), []
        for _ in range(TOKENS):
            with torch.no_grad():
                logprobs = model(ids).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            steps.append((token, float(logprobs[token])))
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        result.append(steps)
    return result


def reload(llm: vllm.LLM, checkpoint: tiny.Checkpoint) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint.packed)})
    llm.reset_prefix_cache()  # it holds keys and values of the old weights


def attention_or_mlp(attention: str, mlp: str) -> Callable[[str], str | None]:
    """Layouts of a model whose last down_proj and output head are kept."""

    def layout_of(module: str) -> str | None:
        if module in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"):
            return None
        return attention if "self_attn" in module else mlp

    return layout_of


def llama(folder: Path, seed: int, **options: Any) -> tiny.Checkpoint:
    """4- and 3-bit, ragged groups, column scales per fused shard, one kept layer."""
    layout_of = attention_or_mlp("row", "sign")
    return tiny.build(folder, tiny.model_config("llama"), layout_of, seed, **options)


def tied_llama(folder: Path, seed: int, **sizes: int) -> tiny.Checkpoint:
    """Packed embeddings that are the output head, too."""
    layouts = attention_or_mlp("row", "sign")

    def layout_of(module: str) -> str | None:
        return "balanced-3" if module == "model.embed_tokens" else layouts(module)

    config = tiny.model_config("llama", tie_word_embeddings=True, **sizes)
    return tiny.build(folder, config, layout_of, seed)


def qwen2(folder: Path, seed: int) -> tiny.Checkpoint:
    """4- and 2-bit, biases of q, k and v, output head and embeddings packed as well."""
    layouts = attention_or_mlp("min-max", "plain")
    others = {"lm_head": "sign", "model.embed_tokens": "min-max"}

    def layout_of(module: str) -> str | None:
        return others.get(module) or layouts(module)

    heads = {"num_attention_heads": 5, "num_key_value_heads": 1}
    return tiny.build(folder, tiny.model_config("qwen2", **heads), layout_of, seed)


def recording(file: Path, **ours: str) -> dict[str, Any]:
    """Options of an engine that writes to `file` which backend computes each layer."""
    return {"additional_config": {"precalib": {"choices_file": str(file), **ours}}}


def recorded(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def case_llama(folder: Path, backend: str | None = None, **options: Any) -> dict[str, Any]:
    first, second = llama(folder / "1", 1), llama(folder / "2", 2)
    ours = {"backend": backend} if backend else {}
    llm = start(first.packed, **recording(folder / "choices", **ours), **options)
    result = {
        "choices": recorded(folder / "choices"),
        "quantization": llm.llm_engine.vllm_config.model_config.quantization,
        "first": (answers(llm), truth(first)),
    }
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_llama_dense(folder: Path) -> dict[str, Any]:
    return case_llama(folder, "dense")


def case_llama_reference(folder: Path) -> dict[str, Any]:
    return case_llama(folder, "reference", quantization="precalib")


def case_qwen2(folder: Path) -> dict[str, Any]:
    first, second = qwen2(folder / "1", 3), qwen2(folder / "2", 4)
    llm = start(first.packed)
    result = {"first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_tied(folder: Path, **options: Any) -> dict[str, Any]:
    first, second = tied_llama(folder / "1", 15), tied_llama(folder / "2", 16)
    llm = start(first.packed, **recording(folder / "choices"), **options)
    result = {"choices": recorded(folder / "choices"), "first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_tied_reference(folder: Path) -> dict[str, Any]:
    checkpoint = tied_llama(folder, 17)
    return {"first": (answers(start(checkpoint.packed, **REFERENCE)), truth(checkpoint))}


def case_tied_dense(folder: Path) -> dict[str, Any]:
    checkpoint = tied_llama(folder, 18)
    return {"first": (answers(start(checkpoint.packed, **DENSE)), truth(checkpoint))}


def case_phi3(folder: Path) -> dict[str, Any]:
    """q, k and v, and gate and up, are one module each in the checkpoint."""

    def build(name: str, seed: int) -> tiny.Checkpoint:
        heads = {"num_attention_heads": 5, "num_key_value_heads": 1}
        layout_of = attention_or_mlp("row", "sign")
        return tiny.build(folder / name, tiny.model_config("phi3", **heads), layout_of, seed)

    first, second = build("1", 11), build("2", 12)
    llm = start(first.packed)
    result = {"first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_stablelm(folder: Path) -> dict[str, Any]:
    """vLLM does not say what it fuses here, so layers are recognized by what arrives at them."""

    def build(name: str, seed: int) -> tiny.Checkpoint:
        layout_of = attention_or_mlp("row", "sign")
        sizes = {"hidden_size": 128, "use_qkv_bias": True}
        return tiny.build(folder / name, tiny.model_config("stablelm", **sizes), layout_of, seed)

    first, second = build("1", 15), build("2", 16)
    llm = start(first.packed, **recording(folder / "choices"))
    result = {"choices": recorded(folder / "choices"), "first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_llama4(folder: Path) -> dict[str, Any]:
    """vLLM's loader reorders rows of q and k, but not of packed tensors."""

    def build(name: str, seed: int) -> tiny.Checkpoint:
        dense = {"moe_layers": [], "interleave_moe_layer_step": 0, "intermediate_size_mlp": 256}
        config = tiny.model_config("llama4", **dense, attention_chunk_size=128)
        return tiny.build(folder / name, config, attention_or_mlp("row", "sign"), seed)

    first, second = build("1", 17), build("2", 18)
    llm = start(first.packed)
    result = {"first": (answers(llm), truth(first))}
    reload(llm, second)
    return {**result, "reloaded": (answers(llm), truth(second))}


def case_two_bits(folder: Path) -> dict[str, Any]:
    """`balanced-2` beside `balanced-3`, as --target-bits mixes them."""
    layout_of = attention_or_mlp("balanced-3", "balanced-2")
    checkpoint = tiny.build(folder, tiny.model_config("llama"), layout_of, 14)
    llm = start(checkpoint.packed, **recording(folder / "choices"))
    return {"choices": recorded(folder / "choices"), "first": (answers(llm), truth(checkpoint))}


def case_int8_activations(folder: Path) -> dict[str, Any]:
    if not library.supported_isas():
        return {}
    checkpoint = llama(folder, 13)
    return {"first": (answers(start(checkpoint.packed, **INT8)), truth(checkpoint))}


def case_half_precision(folder: Path) -> dict[str, Any]:
    """Here the truth is vLLM on the unpacked checkpoint, and it must be met exactly."""
    checkpoint = llama(folder, 5)
    result = {}
    for dtype in ("bfloat16", "float16"):
        packed = answers(start(checkpoint.packed, dtype=dtype, **DENSE))
        result[dtype] = (packed, answers(start(checkpoint.dense, dtype=dtype)))
    return result


def case_online(folder: Path) -> dict[str, Any]:
    """Ordinary checkpoints; the truth is what vLLM answers on the same ones quantized before."""
    sources = [llama(folder / name, seed).dense for name, seed in (("1", 19), ("2", 20))]
    packed = [folder / "3", folder / "4"]
    recipes = {"recipe": "balanced-3", "head": "balanced-4", "embeddings": "rtn-4", "keep": KEPT}
    for source, target in zip(sources, packed, strict=True):
        quantize_checkpoint(source, target, activations="none", jobs=1, **recipes)
    ours = {**recipes, "backend": "reference"}
    options = {"additional_config": {"precalib": ours}, "quantization": "precalib"}
    llm = start(sources[0], **options)
    first = answers(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(sources[1])})
    llm.reset_prefix_cache()
    reloaded = answers(llm)
    truths = [answers(start(target, **REFERENCE)) for target in packed]
    return {"first": (first, truths[0]), "reloaded": (reloaded, truths[1])}


def case_dummy(folder: Path) -> dict[str, Any]:
    checkpoint = llama(folder, 6)
    llm = start(checkpoint.packed, load_format="dummy")
    result: dict[str, Any] = {"tokens": [len(steps) for steps in answers(llm)]}
    llm.llm_engine.vllm_config.load_config.load_format = "auto"
    reload(llm, checkpoint)
    return {**result, "reloaded": (answers(llm), truth(checkpoint))}


def case_lora(folder: Path, **options: Any) -> dict[str, Any]:
    checkpoint = llama(folder / "model", 7)
    deltas = adapter(folder / "adapter", 0.3)
    adapter(folder / "nothing", 0.0)

    def merge(model: Any) -> None:
        for module, delta in deltas.items():
            model.get_submodule(module).weight.data += delta

    llm = start(checkpoint.packed, enable_lora=True, max_lora_rank=8, **options)
    with_adapter = answers(llm, lora_request=LoRARequest("adapter", 1, str(folder / "adapter")))
    with_nothing = answers(llm, lora_request=LoRARequest("nothing", 2, str(folder / "nothing")))
    return {
        "adapter": (with_adapter, truth(checkpoint, merge)),
        "nothing": (with_nothing, truth(checkpoint)),
        "none": (answers(llm), truth(checkpoint)),
    }


def case_lora_dense(folder: Path) -> dict[str, Any]:
    return case_lora(folder, **DENSE)


def case_lora_reference(folder: Path) -> dict[str, Any]:
    return case_lora(folder, **REFERENCE)


def adapter(folder: Path, size: float) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter for packed and kept layers; returns what it adds to each weight."""
    config = tiny.model_config("llama")
    hidden, inner, queries = config.hidden_size, config.intermediate_size, 4 * config.head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (queries // 2, hidden),
        "self_attn.v_proj": (queries // 2, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    rank, alpha = 8, 16
    make = torch.Generator().manual_seed(0)
    tensors, deltas = {}, {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            module = f"model.layers.{layer}.{name}"
            a = torch.randn(rank, columns, generator=make) / columns**0.5
            b = torch.randn(rows, rank, generator=make) * size / rank**0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            deltas[module] = b @ a * alpha / rank
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in shapes]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "bias": "none"}))
    return deltas


def case_refused(folder: Path) -> dict[str, Any]:
    """What the user reads when a checkpoint is not whole, or its values are made to do harm."""

    ranks = "model.layers.0.self_attn.q_proj.salient"
    edits: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "packed": operator.methodcaller("pop", "model.layers.1.self_attn.k_proj.scales"),
        "kept": operator.methodcaller("pop", "model.layers.1.mlp.down_proj.weight"),
        "ranks": lambda tensors: tensors[ranks].fill_(255),
    }
    texts = {}
    for kind, edit in edits.items():
        checkpoint = llama(folder / kind, 8, edit=edit)
        try:
            start(checkpoint.packed)
        except Exception as error:
            texts[kind] = f"{type(error).__name__}: {error}"
    return texts


def case_released(folder: Path) -> dict[str, Any]:
    """Checkpoints that earlier releases wrote, next to the same ones dequantized."""
    results = {}
    for packed in sorted(path for path in RELEASED.iterdir() if path.is_dir()):
        dense = folder / packed.name
        dequantize_checkpoint(packed, dense, dtype=torch.float32)
        checkpoint = tiny.Checkpoint(packed, dense)
        results[packed.name] = answers(start(packed)), truth(checkpoint)
        gc.collect()
    return results


def case_compiled(folder: Path, **options: Any) -> dict[str, Any]:
    checkpoint = tied_llama(folder, 9)
    llm = start(checkpoint.packed, enforce_eager=False, **options)
    return {
        "mode": llm.llm_engine.vllm_config.compilation_config.mode.name,
        "first": (answers(llm), truth(checkpoint)),
    }


def case_compiled_dense(folder: Path) -> dict[str, Any]:
    return case_compiled(folder, **DENSE)


def case_compiled_reference(folder: Path) -> dict[str, Any]:
    return case_compiled(folder, **REFERENCE)


def case_tensor(folder: Path, ranks: int = 2) -> dict[str, Any]:
    """Ranks cut the groups of down_proj, and four of them those of o_proj, too."""
    checkpoint = tied_llama(folder, 10, intermediate_size=352)
    options = {"tensor_parallel_size": ranks, "quantization": "precalib"}
    llm = start(checkpoint.packed, **recording(folder / "choices"), **options)
    choices = recorded(folder / "choices")
    return {"choices": choices, "first": (answers(llm), truth(checkpoint))}


def case_four_tensor(folder: Path) -> dict[str, Any]:
    return case_tensor(folder, 4)


def case_data(folder: Path) -> dict[str, Any]:
    """Every one of two copies of the model answers all prompts."""
    checkpoint = tied_llama(folder, 11)
    arguments = AsyncEngineArgs(str(checkpoint.packed), data_parallel_size=2, **SIZES)

    async def ask() -> list[Answers]:
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            return [
                await asyncio.gather(*(answer(engine, prompt, copy) for prompt in PROMPTS))
                for copy in range(2)
            ]
        finally:
            engine.shutdown()

    true = truth(checkpoint)
    return {"copies": [(served, true) for served in asyncio.run(ask())]}


async def answer(engine: AsyncLLM, prompt: list[int], copy: int) -> list[tuple[int, float]]:
    outputs = engine.generate(
        {"prompt_token_ids": prompt},
        GREEDY,
        request_id=f"{copy}-{len(prompt)}",
        data_parallel_rank=copy,
    )
    final = [output async for output in outputs][-1].outputs[0]
    return [(t, step[t].logprob) for t, step in zip(final.token_ids, final.logprobs, strict=True)]


def case_pipeline(folder: Path, **options: Any) -> dict[str, Any]:
    """Embeddings on the first rank, the head that shares them on the last."""
    checkpoint = tied_llama(folder, 12)
    llm = start(checkpoint.packed, pipeline_parallel_size=2, **WARMED_UP, **options)
    return {"first": (answers(llm), truth(checkpoint))}


def case_four_pipeline(folder: Path) -> dict[str, Any]:
    return case_pipeline(folder, tensor_parallel_size=2)


def case_eager_pipeline(folder: Path) -> dict[str, Any]:
    """An unpacked model, which this vLLM cannot serve so."""
    checkpoint = tied_llama(folder, 12)
    try:
        answers(start(checkpoint.dense, pipeline_parallel_size=2))
    except Exception as error:
        return {"text": f"{type(error).__name__}: {error}"}
    return {"text": "served"}


def case_ray(folder: Path) -> dict[str, Any]:
    """A packed model and an unpacked one on two nodes of a Ray cluster."""
    from ray_cluster import ENVIRONMENT, RayCluster

    checkpoint = tied_llama(folder, 12)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    cluster, texts = RayCluster(), {}
    os.environ.update(ENVIRONMENT, RAY_ADDRESS=cluster.address)
    try:
        for path in (checkpoint.packed, checkpoint.dense):
            try:
                answers(start(path, **options))
                texts[path.name] = "served"
            except Exception as error:
                texts[path.name] = f"{type(error).__name__}: {error}"
    finally:
        cluster.stop()
    return texts


SUITES = {
    "eager": [
        case_llama,
        case_llama_dense,
        case_llama_reference,
        case_qwen2,
        case_tied,
        case_tied_reference,
        case_tied_dense,
        case_phi3,
        case_stablelm,
        case_llama4,
        case_two_bits,
        case_int8_activations,
        case_half_precision,
        case_online,
        case_dummy,
        case_lora,
        case_lora_dense,
        case_lora_reference,
        case_refused,
        case_released,
    ],
    "compiled": [case_compiled, case_compiled_dense, case_compiled_reference],
    "parallel": [case_tensor, case_data, case_eager_pipeline],
    "parallel_four": [case_four_tensor],
    "pipeline": [case_pipeline],
    "pipeline_four": [case_four_pipeline],
    "ray": [case_ray],
}


def main(suite: str, folder: Path) -> None:
    """Written after every case, so that one that ends the process takes no other with it."""
    results = {}
    for case in SUITES[suite]:
        name = case.__name__.removeprefix("case_")
        print(f"=== case {name}", flush=True)
        try:
            results[name] = case(folder / name)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        (folder / "results.json").write_text(json.dumps(results))
        gc.collect()  # frees the engine


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
