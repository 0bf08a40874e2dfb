"""Quantize, verify and serve tiny random models of many families.

    python family_suite.py prepare FOLDER [NAME …]    quantize; transformers' answers
    python family_suite.py serve FOLDER               vLLM's answers, in a process of its own
    python family_suite.py all FOLDER                 both for every family, and the documentation

transformers has to answer before vLLM is imported: vLLM's backend for its models changes it. The
results are in FOLDER/results.json.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does
from families import FAMILIES, Family

PROMPTS = [[5, 17, 101, 44, 3, 150], [199, 1, 64], list(range(20, 60))]
STEPS = 6
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else asking for log probabilities compiles the sampler
    "HF_HUB_OFFLINE": "1",
}


def prepare(family: Family, folder: Path) -> dict[str, Any]:
    """Quantize a family's model; what was packed, what stayed, and what transformers answers."""
    import offline_quantize
    from offline_quantize.checkpoint.manifest import read_manifest

    source, packed, dense = (folder / name for name in ("source", "packed", "dense"))
    family.write(source)
    head = "balanced-4" if family.head else None
    offline_quantize.quantize_checkpoint(
        source, packed, keep=family.keep, head=head, activations="none", jobs=1
    )
    faults = offline_quantize.verify_checkpoint(packed, source)
    assert not faults, faults
    offline_quantize.dequantize_checkpoint(packed, dense, dtype=torch.float32, jobs=1)
    manifest = read_manifest(packed)
    reasons = {
        name.rpartition(".")[0].rpartition(".")[2]: reason
        for name, reason in manifest.unquantized.items()
        if reason not in ("norm", "embedding", "not a linear weight", "output head")
    }
    result = {"packed": len(manifest.tensors), "unquantized": reasons}
    if family.reference == "transformers":
        result["truth"] = truth(family, dense)
    return result


@torch.inference_mode()
def truth(family: Family, dense: Path) -> list[list[list[float]]]:
    """Greedy tokens with their log probabilities."""
    import transformers

    model = getattr(transformers, family.model).from_pretrained(dense, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        tokens, steps = list(prompt), []
        for _ in range(STEPS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            logprobs = logits.float().log_softmax(-1)
            tokens.append(int(logprobs.argmax()))
            steps.append([tokens[-1], float(logprobs[tokens[-1]])])
        answers.append(steps)
    return answers


def served(family: Family, folder: Path) -> list[list[Any]]:
    """vLLM's answers: tokens with log probabilities, or vectors."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        skip_tokenizer_init=not family.pooling,
        runner="pooling" if family.pooling else "auto",
        seed=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if family.pooling:
        task = "classify" if "Classification" in family.model else "embed"
        outputs = llm.encode(prompts, pooling_task=task, use_tqdm=False)
        return [[[0, float(x)] for x in output.outputs.data.flatten()] for output in outputs]
    sampling = SamplingParams(
        temperature=0, max_tokens=STEPS, logprobs=1, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        [[t, step[t].logprob] for t, step in zip(out.token_ids, out.logprobs, strict=True)]
        for out in (output.outputs[0] for output in outputs)
    ]


def compared(family: Family, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Whether the packed model answers like its reference, and the largest difference."""
    answers = served(family, folder / "packed")
    gc.collect()
    truths = result.pop("truth", None) or served(family, folder / "dense")
    pairs = [
        (ours, theirs)
        for answer, other in zip(answers, truths, strict=True)
        for ours, theirs in zip(answer, other, strict=True)
    ]
    return {
        **result,
        "same_tokens": all(ours[0] == theirs[0] for ours, theirs in pairs),
        "difference": max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
    }


def run(phase: str, folder: Path, names: list[str]) -> None:
    """One phase for each family; what fails is written down and ends no other."""
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in names or list(results):
        family, place = FAMILIES[name], folder / name.replace(" ", "-")
        if "failed" in results.get(name, {}) or (
            phase == "serve" and "difference" in results[name]
        ):
            continue
        try:
            if phase == "prepare":
                results[name] = prepare(family, place)
            else:
                results[name] = compared(family, place, results[name])
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        file.write_text(json.dumps(results, indent=1))
        gc.collect()


def in_processes(folder: Path, names: list[str], **more: Any) -> dict[str, Any]:
    """Both phases, each in a process; the results by name."""
    environment = os.environ | ENVIRONMENT
    for phase in ("prepare", "serve"):
        command = [sys.executable, __file__, phase, str(folder)]
        command += names if phase == "prepare" else []
        subprocess.run(command, env=environment, check=True, **more)
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    phase, folder, *names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    if phase == "all":
        import supported_models

        results = in_processes(Path(folder), names or list(FAMILIES))
        supported_models.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        supported_models.PAGE.write_text(supported_models.page(results))
    else:
        run(phase, Path(folder), names)


if __name__ == "__main__":
    main()
