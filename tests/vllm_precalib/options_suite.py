"""Options of vLLM on packed models: `python options_suite.py SUITE FOLDER` writes results.json.

As engines_suite.py; an engine takes several options at once where they do not hide each other.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "experts"))
import engines_suite as engines
import experts_suite as experts
import tiny
import tiny_models
from engines_suite import DENSE, GREEDY, TOKENS, answers, attention_or_mlp, start, truth
from vllm.sampling_params import StructuredOutputsParams

from offline_quantize import dequantize_checkpoint, quantize_checkpoint
from offline_quantize.checkpoint.manifest import read_manifest

REPEATED = list(range(20, 46)) * 4
LONG = [REPEATED, REPEATED[:70], [*REPEATED[:64], 5, 7]]
BACKENDS: dict[str, dict[str, Any]] = {"default": {}, "dense": DENSE}
PATTERN = "[ab]{3}c[0-9]{2}"


def build(folder: Path, vocabulary: int = 257) -> tiny.Checkpoint:
    """A tiny Llama and a tokenizer of bytes."""
    config = tiny.model_config("llama", vocab_size=vocabulary)
    checkpoint = tiny.build(folder, config, attention_or_mlp("row", "sign"), 21)
    tiny_models.byte_tokenizer().save_pretrained(checkpoint.packed)
    return checkpoint


def counted(llm: vllm.LLM, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


SCHEDULING = {
    "enable_prefix_caching": True,
    "block_size": 32,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 32,
    "disable_log_stats": False,
    "skip_tokenizer_init": False,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def answered(llm: vllm.LLM) -> dict[str, Any]:
    """Answers to long prompts, twice, and one that follows a regular expression."""
    grammar = vllm.SamplingParams(
        temperature=0,
        max_tokens=12,
        logprobs=1,
        structured_outputs=StructuredOutputsParams(regex=PATTERN),
    )
    found = {"first": answers(llm, LONG), "again": answers(llm, LONG)}
    output = llm.generate([{"prompt_token_ids": LONG[0]}], grammar, use_tqdm=False)[0].outputs[0]
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return {
        **found,
        "cached": counted(llm, "vllm:prefix_cache_hits"),
        "drafts": counted(llm, "vllm:spec_decode_num_drafts"),
        "accepted": counted(llm, "vllm:spec_decode_num_accepted_tokens"),
        "text": output.text,
        "logprobs": [step[token].logprob for token, step in steps],
    }


def case_scheduling(folder: Path) -> dict[str, Any]:
    """Prefix caching, chunked prefill, structured output and logprobs."""
    checkpoint = build(folder)
    return {
        "truth": truth(checkpoint, texts=LONG),
        "pattern": PATTERN,
        **{
            label: answered(start(checkpoint.packed, **SCHEDULING, **ours))
            for label, ours in BACKENDS.items()
        },
    }


def case_ngram(folder: Path) -> dict[str, Any]:
    """The same with ngram speculation.

    After it vLLM 0.32 starts no other engine in the process: it stumbles over numba's modules.
    """
    checkpoint = build(folder)
    llm = start(checkpoint.packed, **SCHEDULING, speculative_config=NGRAM)
    return {"truth": truth(checkpoint, texts=LONG), "default": answered(llm)}


def beside_dense(folder: Path, **options: Any) -> dict[str, Any]:
    checkpoint = engines.llama(folder, 22)
    return {
        label: answers(start(checkpoint.packed, **options, **ours))
        for label, ours in BACKENDS.items()
    }


def case_float16(folder: Path) -> dict[str, Any]:
    return beside_dense(folder, dtype="float16")


def case_fp8_kv_cache(folder: Path) -> dict[str, Any]:
    """In float32, where backends differ less than keys and values are rounded."""
    return {
        **beside_dense(folder, kv_cache_dtype="fp8"),
        "whole": truth(tiny.Checkpoint(folder / "packed", folder / "dense")),
    }


def add_draft(folder: Path) -> None:
    """Make the last of a GLM-4-MoE's layers the one that predicts a token more."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    config = json.loads(config_file.read_text())
    last = config["num_hidden_layers"] - 1
    config |= {"num_hidden_layers": last, "num_nextn_predict_layers": 1}
    config_file.write_text(json.dumps(config))
    tensors = load_file(file)
    width, prefix = config["hidden_size"], f"model.layers.{last}"
    torch.manual_seed(0)
    added = {
        "enorm.weight": torch.ones(width),
        "hnorm.weight": torch.ones(width),
        "eh_proj.weight": torch.randn(width, 2 * width) * 0.08,
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "shared_head.norm.weight": torch.ones(width),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file({**tensors, **{f"{prefix}.{name}": t for name, t in added.items()}}, file)


def case_draft_head(folder: Path) -> dict[str, Any]:
    """A head that predicts a token more (MTP) is carried over unpacked; its drafts are checked."""
    checkpoint = experts.build(folder, "glm4_moe", edit=add_draft, layers=3)
    config = json.loads((checkpoint.packed / "config.json").read_text())
    packed = config["quantization_config"]["modules"]
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    plain = answers(start(checkpoint.packed))
    llm = start(checkpoint.packed, speculative_config=speculative, disable_log_stats=False)
    return {
        "packed": list(packed),
        "first": (answers(llm), plain),
        "drafts": counted(llm, "vllm:spec_decode_num_drafts"),
    }


def case_streamed(folder: Path) -> dict[str, Any]:
    """Weights are views of a buffer that the streamer fills again with those that follow."""
    checkpoint = engines.llama(folder, 23)
    found: dict[str, Any] = {"truth": truth(checkpoint)}
    for label, path in (("packed", checkpoint.packed), ("online", checkpoint.dense)):
        for load_format in ("auto", "runai_streamer"):
            llm = start(path, load_format=load_format, quantization="precalib")
            found[f"{label} {load_format}"] = answers(llm)
            del llm  # vLLM has one engine at a time
            gc.collect()
    return found


PROMPTS_WITH_IMAGES: list[tuple[str, list[int]]] = [
    ("What is <image> this?", [0]),
    ("What is <image> this?", [1]),
    ("<image><image>", [0, 1]),
    ("No image.", []),
]


def about_images(path: Path, **options: Any) -> engines.Answers:
    prompts = []
    for prompt, seeds in PROMPTS_WITH_IMAGES:
        images = [tiny_models.random_image(seed) for seed in seeds]
        more = {"multi_modal_data": {"image": images}} if images else {}
        prompts.append({"prompt": prompt, **more})
    llm = start(path, skip_tokenizer_init=False, **options)
    outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    return [
        [(t, step[t].logprob) for t, step in zip(o.token_ids, o.logprobs, strict=True)]
        for o in outputs
    ]


@torch.inference_mode()
def truth_about_images(path: Path) -> engines.Answers:
    """As transformers answers."""
    processor = transformers.AutoProcessor.from_pretrained(path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    found = []
    for prompt, seeds in PROMPTS_WITH_IMAGES:
        images = [tiny_models.random_image(seed) for seed in seeds] or None
        inputs, steps = processor(text=prompt, images=images, return_tensors="pt"), []
        for _ in range(TOKENS):
            logprobs = model(**inputs).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            steps.append((token, float(logprobs[token])))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found.append(steps)
    return found


def case_images(folder: Path) -> dict[str, Any]:
    """A vision-language model whose tower stays as it was."""
    source, packed, dense = (folder / name for name in ("source", "packed", "dense"))
    tiny_models.write_idefics3(source, 24)
    quantize_checkpoint(source, packed, activations="none", jobs=1)
    dequantize_checkpoint(packed, dense, dtype=torch.float32, jobs=1)
    return {
        "unquantized": dict(read_manifest(packed).unquantized),
        "truth": truth_about_images(dense),
        "packed": about_images(packed),
        "dense": about_images(packed, **DENSE),
        "online": about_images(source, quantization="precalib"),
        "source": truth_about_images(source),
    }


def refusal(path: Path, **options: Any) -> str:
    try:
        start(path, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def case_refused(folder: Path) -> dict[str, Any]:
    checkpoint = engines.llama(folder, 23)
    return {
        "sharded_state": refusal(checkpoint.packed, load_format="sharded_state"),
        "sleep": refusal(checkpoint.packed, enable_sleep_mode=True),
    }


engines.SUITES = {
    "options": [
        case_scheduling,
        case_float16,
        case_fp8_kv_cache,
        case_draft_head,
        case_images,
        case_streamed,
        case_refused,
        case_ngram,
    ]
}

if __name__ == "__main__":
    engines.main(sys.argv[1], Path(sys.argv[2]))
