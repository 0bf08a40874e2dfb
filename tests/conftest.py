import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct in bf16; built once (about a minute) and then reused."""
    directory = ROOT / "demo-output" / "SmolLM2-135M-Instruct"
    command = [sys.executable, str(ROOT / "deploy" / "smollm2.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"cannot build the real model: {done.stderr.strip()[-2000:]}")
    return directory


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random two-layer llama, sizes as LlamaConfig names them, with a tokenizer of bytes.

    Token 256 begins a text; of the vocabulary of 260 the rest is unused.
    """

    def write(**sizes: int) -> Path:
        import torch
        from tiny_models import random_llama
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        begin = 256
        root = tmp_path_factory.mktemp("models") / "source"
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": begin}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)]
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(root)
        tokens = {"bos_token_id": begin, "eos_token_id": None, "pad_token_id": None}
        model = random_llama(vocab_size=260, **tokens, **sizes)
        model.lm_head.weight.data *= 20  # far from uniform
        for parameter in model.model.layers.parameters():
            parameter.data *= 4 if parameter.ndim == 2 else 1
        model.to(torch.bfloat16).save_pretrained(root)
        return root

    return write
