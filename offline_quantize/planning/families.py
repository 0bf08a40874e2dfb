"""What is special about families of models: weights that vLLM takes unquantized only, heads, and
where the embeddings are that a tied head is a copy of.

Most models need no entry. `vllm_models` is the part that is read off vLLM's source; the tables here
come from reading its loaders, and a test names every loader that rewrites a tensor.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from offline_quantize.planning.vllm_models import UNPACKABLE_HEADS


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Weights that stay unquantized: vLLM rewrites them, which it cannot do with packed tensors, or
    takes nothing else.

    architectures: as config.json names them.
    modules:       pattern searched in the names of modules, fused ones whole.
    what:          vLLM does: "vLLM …".
    """

    architectures: frozenset[str]
    modules: re.Pattern[str]
    what: str


def _rewrite(what: str, modules: str, *architectures: str) -> Rewrite:
    return Rewrite(frozenset(architectures), re.compile(modules), what)


UNASKED = "does not ask how it is quantized"
SPARSE_ATTENTION = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")  # with an indexer
REWRITES = (
    _rewrite(
        "folds a permutation into its rows when it loads it",
        r"\.self_attn\.[qkv]_proj$",
        "K2HorizonForCausalLM",
    ),
    _rewrite(
        "splits its rows by heads when it loads it",
        r"\.query_key_value$",
        "BloomForCausalLM",
        "BloomModel",
    ),
    _rewrite(
        "splits its rows in two when it loads it",
        r"\.up_gate_proj$",
        "GteModel",
        "GteNewModel",
        "GteNewForSequenceClassification",
        "NewModel",
        "NewForSequenceClassification",
    ),
    _rewrite(
        "splits its rows by heads when it loads it",
        r"\.(?:query|key_value)$",
        "TeleChat2ForCausalLM",
    ),
    _rewrite(
        "copies its rows into another weight when it loads it",
        r"\.self_attn\.[qkv]_proj$",
        "Step3TextForCausalLM",
        "Step3VLForConditionalGeneration",
    ),
    _rewrite(
        UNASKED,
        r"\.(?:mixer|mamba)\.(?:in_proj|x_proj|dt_proj|out_proj)$",
        "MambaForCausalLM",
        "FalconMambaForCausalLM",
        "JambaForCausalLM",
        "JambaForSequenceClassification",
    ),
    _rewrite("knows its weight by that name only", r"_adapter_list\.", "Zamba2ForCausalLM"),
    _rewrite(UNASKED, r"\.indexer\.(?:wk|weights_proj)$", *SPARSE_ATTENTION),
)
# Architectures none of whose weights can be packed, and what vLLM does.
REFUSED = {
    "JinaEmbeddingsV5Model": "adds a LoRA adapter to its weights when it loads them",
}
# Model types whose embeddings vLLM hands to a quantization method.
EMBEDDING_MODELS = frozenset(
    (
        *("llama", "mistral", "phi3", "granite", "exaone4", "stablelm", "gemma3_text"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
    )
)
# Module of the embeddings, and of the head that is a copy of it where they are tied.
TIED_HEADS = {
    "model.embed_tokens": "lm_head",
    "model.language_model.embed_tokens": "lm_head",
    "language_model.model.embed_tokens": "language_model.lm_head",
    "transformer.word_embeddings": "lm_head",
    "transformer.wte": "lm_head",
}


def architectures_of(*configs: Mapping[str, Any]) -> set[str]:
    """What the configurations say that the model is, as vLLM names it.

    configs: of the model, and of the language model inside if that is another. The latter seldom
             names an architecture, so one is made of its type: "cohere2" is Cohere2ForCausalLM.
    """
    return set(_architectures(configs))


def rewritten(architectures: Iterable[str], module: str) -> str | None:
    """What vLLM does with the weight of `module`, if a packed one would not be served."""
    found = set(architectures)
    for rewrite in REWRITES:
        if rewrite.architectures & found and rewrite.modules.search(module):
            return rewrite.what
    return None


def refused(architectures: Iterable[str]) -> str | None:
    """Why no weight of the model can be packed, "ARCHITECTURE: vLLM …"; None if some can."""
    for name in sorted(architectures):
        if name in REFUSED:
            return f"{name}: vLLM {REFUSED[name]}"
    return None


def unpackable_head(architectures: Iterable[str]) -> str | None:
    """The first of the architectures that vLLM serves with an unquantized head only."""
    return min(UNPACKABLE_HEADS.intersection(architectures), default=None)


def _architectures(configs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    known = {name.lower(): name for name in UNPACKABLE_HEADS}
    for config in configs:
        names = config.get("architectures")
        yield from (name for name in names or () if isinstance(name, str))
        if isinstance(kind := config.get("model_type"), str):
            made = f"{kind.removesuffix('_text').replace('_', '')}forcausallm"
            if made in known:
                yield known[made]
