"""Model types whose embeddings may be packed: vLLM must hand them to a quantization method."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from offline_quantize.planning.families import EMBEDDING_MODELS

WHOLE_MODEL = re.compile(r"\w+ForCausalLM$|[A-Z][a-z]+\d*Model$")
MODELS = Path(vllm.__file__).parent / "model_executor" / "models"


def embeddings(module: str) -> Iterator[ast.Call]:
    """Calls that make embeddings, in a file of vLLM's or else in those whose classes it takes."""
    tree = ast.parse((MODELS / f"{module}.py").read_text())
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "VocabParallelEmbedding"
    ]
    if found:
        yield from found
        return
    for node in ast.walk(tree):
        classes = [name.name for name in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom) and any(map(WHOLE_MODEL.match, classes)):
            yield from embeddings(str(node.module).rpartition(".")[2])


def hands_over(module: str) -> bool:
    calls = list(embeddings(module))
    return bool(calls) and all(
        any(keyword.arg == "quant_config" for keyword in call.keywords) for call in calls
    )


@pytest.mark.parametrize("model_type", sorted(EMBEDDING_MODELS))
def test_vllm_hands_over_the_embeddings(model_type):
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    names = [names] if isinstance(names, str) else names
    served = [_TEXT_GENERATION_MODELS[name] for name in names if name in _TEXT_GENERATION_MODELS]
    assert served
    assert all(hands_over(module) for module, _ in served)


@pytest.mark.parametrize("module", ["gemma2", "commandr", "opt"])
def test_others_do_not(module):
    assert not hands_over(module)
