"""Random models small enough to build in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

# config.json of a llama of two layers, two query heads of size 16 for each of four KV heads
GROUPED_QUERY_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def random_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A llama of two layers with grouped-query attention, in float32.

    config: fields of LlamaConfig, sizes above all.
    """
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))


def byte_tokenizer(*special: str) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, one for the end, and `special` ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {letter: number for number, letter in enumerate([*letters, "<end>", *special])}
    model = Tokenizer(models.BPE(entries, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<end>", additional_special_tokens=list(special)
    )


def write_idefics3(folder: Path, seed: int) -> None:
    """Write an Idefics 3, in float32, that sees an image of 32 × 32 pixels as four tokens.

    Images need Pillow alone; vLLM's code for most other models needs torchvision.
    """
    tokenizer = byte_tokenizer("<image>", "<fake_token_around_image>", "<global-img>")
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.1,
    }
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    transformers.Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    size = {"longest_edge": 32}
    images = transformers.Idefics3ImageProcessorPil(
        size=size, max_image_size=size, do_image_splitting=False
    )
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)


def random_image(seed: int) -> Image.Image:
    """32 × 32 pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)
