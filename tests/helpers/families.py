"""Tiny random models of the families that are quantized and served in tests.

Sizes are the smallest that keep each family's own structure: grouped queries, its mixers, its head.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one architecture.

    config:    name of its configuration class in transformers, without "Config".
    model:     name of its model class.
    changes:   fields of the configuration beyond SIZES.
    keep:      what --keep leaves out.
    head:      whether the output head is quantized too.
    pooling:   whether vLLM answers with vectors in place of tokens.
    reference: "transformers" on the dequantized checkpoint; or "vllm" on it, for vectors, and where
               vLLM's own answers on it are not those of transformers.
    """

    config: str
    model: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep: Sequence[str] = ()
    head: bool = False
    pooling: bool = False
    reference: str = "transformers"

    def write(self, folder: Path) -> None:
        """A checkpoint with random weights, float32, and a tokenizer for models of vectors."""
        import torch
        import transformers

        torch.manual_seed(1)
        fields = {**SIZES, **self.changes}
        config = getattr(transformers, f"{self.config}Config")(**fields)
        model = getattr(transformers, self.model)(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        if self.pooling:
            write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 words, which vLLM wants for models of vectors."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"word{i}": i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="word0", pad_token="word0"
    ).save_pretrained(folder)


def language(config: str, **changes: Any) -> Family:
    """A language model whose classes are called alike."""
    return Family(config, f"{config}ForCausalLM", changes)


def vectors(config: str, model: str, **changes: Any) -> Family:
    """A model that answers with vectors."""
    return Family(config, model, changes, pooling=True, reference="vllm")


def with_head(family: Family, **changes: Any) -> Family:
    """The same with a packed output head."""
    return dataclasses.replace(family, head=True, changes={**family.changes, **changes})


TIED = {"tie_word_embeddings": True}
GEMMA = {**TIED, "head_dim": 32}
LLAMA4 = {
    "head_dim": 32,
    "intermediate_size_mlp": 256,
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
    "num_local_experts": 1,
    "attention_chunk_size": 128,
}
HYBRID = {
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 256,
    "position_embedding_type": "rope",
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mlp"],
    "num_hidden_layers": 3,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 64,
}
MAMBA2 = {"state_size": 16, "num_heads": 4, "head_dim": 64, "n_groups": 1, "chunk_size": 64}
ZAMBA2 = {
    "mamba_d_state": 16,
    "n_mamba_heads": 4,
    "mamba_headdim": 64,
    "mamba_ngroups": 1,
    "chunk_size": 64,
    "hybrid_layer_ids": [1],
    "layers_block_type": ["mamba", "hybrid"],
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "num_key_value_heads": 4,
}
FALCON = {"alibi": False, "bos_token_id": 1, "eos_token_id": 1}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = {
    "Llama": language("Llama"),
    "Mistral": language("Mistral", head_dim=32),
    "Qwen 2": language("Qwen2"),
    "Qwen 3": language("Qwen3", head_dim=32),
    "Gemma": language("Gemma", **GEMMA),
    "Gemma 2": language("Gemma2", **GEMMA, query_pre_attn_scalar=32),
    "Gemma 3": Family("Gemma3Text", "Gemma3ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 32}),
    "Phi": language("Phi"),
    "Phi 3": language("Phi3"),
    "OLMo": language("Olmo"),
    "OLMo 2": language("Olmo2"),
    "OLMo 3": language("Olmo3", **SLIDING),
    "Granite": language("Granite"),
    "Granite 4 hybrid": language("GraniteMoeHybrid", **HYBRID, **MAMBA),
    "Cohere": language("Cohere", **TIED),
    "Cohere 2": language("Cohere2", **TIED),
    "StarCoder 2": language("Starcoder2"),
    "SmolLM 3": language("SmolLM3"),
    "GLM": language("Glm", head_dim=32),
    "GLM 4": language("Glm4", head_dim=32),
    "EXAONE 4": language("Exaone4"),
    "ERNIE 4.5": language("Ernie4_5", head_dim=32),
    "Nemotron": language("Nemotron"),
    "Nemotron H": language("NemotronH", **NEMOTRON_H),
    "OPT": language("OPT", ffn_dim=256, word_embed_proj_dim=128, pad_token_id=1, bos_token_id=2),
    "Falcon (one key head)": language("Falcon", **FALCON, multi_query=True),
    "Falcon (new)": language("Falcon", **FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "Falcon (old)": language("Falcon", **FALCON, multi_query=False),
    "Falcon H1": language("FalconH1", head_dim=32, mamba_d_ssm=256, **MAMBA),
    "BLOOM": language("Bloom", n_head=4, n_layer=2, **TIED),
    "StableLM": language("StableLm", use_qkv_bias=True),
    "Llama 4 (without experts)": Family("Llama4Text", "Llama4ForCausalLM", LLAMA4),
    "Mamba 2": language("Mamba2", **MAMBA2),
    "Zamba 2": dataclasses.replace(language("Zamba2", **ZAMBA2), reference="vllm"),
    "Arcee": language("Arcee"),
    "Seed-OSS": language("SeedOss", head_dim=32),
    "Hunyuan": language("HunYuanDenseV1", head_dim=32),
    "Apertus": language("Apertus"),
    "Helium": language("Helium", head_dim=32),
    "GPT-NeoX": dataclasses.replace(language("GPTNeoX"), reference="vllm"),
    "Persimmon": dataclasses.replace(language("Persimmon"), reference="vllm"),
    "Qwen 3 embedding": vectors("Qwen3", "Qwen3Model", head_dim=32),
    "Llama embedding": vectors("Llama", "LlamaModel"),
    "BERT": vectors("Bert", "BertModel"),
    "RoBERTa": vectors("Roberta", "RobertaModel", pad_token_id=1, max_position_embeddings=130),
    "ModernBERT": vectors("ModernBert", "ModernBertModel"),
    "Qwen 2 classification": vectors("Qwen2", "Qwen2ForSequenceClassification", num_labels=3),
}
FAMILIES |= {
    f"{name}, packed head": with_head(FAMILIES[name])
    for name in ("Gemma 3", "Phi", "StableLM", "Nemotron", "Falcon (new)", "GPT-NeoX")
}
FAMILIES |= {
    f"{name}, packed copy of the embeddings as head": with_head(FAMILIES[name], **TIED)
    for name in ("Llama", "Falcon (new)")
}
# Those of the ordinary suite: what each shows is in another one too, but not in these together.
ORDINARY = (
    "Gemma 3",
    "Falcon (new), packed copy of the embeddings as head",
    "Falcon H1",
    "Granite 4 hybrid",
    "BLOOM",
    "StableLM, packed head",
    "Qwen 3 embedding",
    "BERT",
)
