"""Run by test_served.py in a process of its own: what vLLM and transformers answer, as JSON.

    python serve_suite.py PACKED DENSE DTYPE

PACKED is served by vLLM, DENSE (its `precalib dequantize`) runs in transformers. Both get the same
prompts of token ids; the result holds greedy tokens, their log probabilities and the 20 likeliest
tokens at each step.
"""

import json
import sys

import torch

PROMPTS = ([5, 17, 40, 3, 22, 9, 31, 12], [40, 41, 42, 43, 7, 7, 7, 1], [2, 30, 11])
STEPS = 8
TOP = 20


def served(packed: str, dtype: str) -> list:
    from vllm import LLM, SamplingParams

    llm = LLM(
        packed,
        quantization="precalib",
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=TOP, detokenize=False)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        [
            {"token": token, "logprobs": {str(t): lp.logprob for t, lp in step.items()}}
            for token, step in zip(out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True)
        ]
        for out in outputs
    ]


@torch.inference_mode()
def expected(dense: str, dtype: str, answers: list) -> list:
    """Log probabilities of transformers along the tokens vLLM chose: a tie costs one step only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype)).eval()
    results = []
    for prompt, steps in zip(PROMPTS, answers, strict=True):
        tokens = [*prompt, *(step["token"] for step in steps)]
        logits = model(torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
        tops = logits.float().log_softmax(-1).topk(TOP)
        results.append(
            [
                {
                    "token": int(index[0]),
                    "logprobs": {str(int(i)): float(v) for i, v in zip(index, value, strict=True)},
                }
                for value, index in zip(tops.values, tops.indices, strict=True)
            ]
        )
    return results


if __name__ == "__main__":
    packed, dense, dtype = sys.argv[1:]
    answers = served(packed, dtype)
    print("RESULT " + json.dumps({"vllm": answers, "hf": expected(dense, dtype, answers)}))
