"""What the installed vLLM's model files say that the quantizer has to know, read off their source.

    python tests/helpers/vllm_model_table.py

writes offline_quantize/planning/vllm_models.py, because the quantizer may not import vLLM.
"""

import ast
import importlib.metadata
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "offline_quantize/planning/vllm_models.py"
HEADING = '''"""What vLLM {version} does with models, as its source says; see `families`.

Written by tests/helpers/vllm_model_table.py; a test compares it with the installed vLLM.
"""

# Names of modules of one parent that some model computes as one layer.
FUSED: tuple[tuple[str, ...], ...] = (
{fused})

# Architectures whose output head cannot be packed: vLLM multiplies with the embeddings, or builds
# the head without asking how it is quantized, or changes its weight when it is loaded.
UNPACKABLE_HEADS = frozenset(
    {{
{heads}    }}
)
'''
NORMALIZED_HEAD = "_normalize_lm_head"  # a loader that changes the head's weight


def trees() -> dict[str, ast.Module]:
    """The parsed files of vLLM's models, by their names in their folder without ".py"."""
    spec = importlib.util.find_spec("vllm")
    assert spec
    assert spec.origin
    root = Path(spec.origin).parent
    return {
        path.relative_to(folder).with_suffix("").as_posix(): ast.parse(path.read_text())
        for folder in (root / "models", root / "model_executor" / "models")
        for path in sorted(folder.rglob("*.py"))
    }


def literal(node: ast.expr | None) -> Any:
    """The value of a constant expression, else None."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def leaf(name: str) -> str:
    """Last part of a pattern for modules: "q_proj" of ".self_attn.q_proj" or ".q_proj.weight"."""
    return name.removesuffix(".weight").removesuffix(".bias").strip(".").rpartition(".")[2]


def mappings(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Fused layers and their parts, from every kind of table that vLLM's models have."""
    for node in ast.walk(tree):
        pairs: list[tuple[str, str]] = []
        if isinstance(node, ast.keyword) and node.arg == "orig_to_new_stacked":
            if isinstance(node.value, ast.Dict):
                for part, target in zip(node.value.keys, node.value.values, strict=True):
                    if (fused := literal(target)) and isinstance(literal(part), str):
                        pairs.append((fused[0], literal(part)))
        elif isinstance(node, ast.List):  # (fused, part, shard id)
            rows = [literal(row) for row in node.elts]
            pairs = [
                (row[0], row[1])
                for row in rows
                if isinstance(row, tuple)
                and len(row) == 3
                and all(isinstance(name, str) and "." not in name.strip(".") for name in row[:2])
            ]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any("packed_modules_mapping" in ast.unparse(target) for target in targets):
                for fused_name, parts in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(found := literal(parts), list):
                        pairs += [(literal(fused_name), part) for part in found]
        for fused, group in itertools.groupby(sorted(pairs, key=lambda p: p[0]), lambda p: p[0]):
            yield fused, tuple(dict.fromkeys(leaf(part) for _, part in group))


def fused_groups(sources: Mapping[str, ast.Module]) -> list[tuple[str, ...]]:
    """Every set of names that some model fuses, each once."""
    found = {
        parts for tree in sources.values() for _, parts in mappings(tree) if len(parts) > 1
    } - {parts for tree in sources.values() for _, parts in mappings(tree) if "conv" in parts[0]}
    unordered = {frozenset(parts): parts for parts in sorted(found)}
    return sorted(unordered.values(), key=lambda parts: (-len(parts), parts))


def own_head(node: ast.ClassDef) -> bool | None:
    """Whether the head that this class makes or multiplies with can be packed; None if neither."""
    verdict = None
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        function = ast.unparse(call.func)
        if function == "ParallelLMHead":
            verdict = any(keyword.arg == "quant_config" for keyword in call.keywords)
        by = ast.unparse(call.args[0]) if call.args else ""
        if function.endswith("logits_processor") and ("embed" in by or "wte" in by):
            return False
        if function.endswith(NORMALIZED_HEAD):
            return False
    return verdict


def inner_architectures(node: ast.ClassDef) -> Iterator[str]:
    """Architectures of the language model that a larger model builds."""
    for keyword in ast.walk(node):
        if isinstance(keyword, ast.keyword) and keyword.arg == "architectures":
            yield from literal(keyword.value) or ()


def unpackable_heads(sources: Mapping[str, ast.Module]) -> list[str]:
    """Architectures of vLLM's registry, but draft models, whose head cannot be packed."""
    from vllm.model_executor.models import registry

    classes = {
        node.name: node
        for tree in sources.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    known = {
        architecture: where[1]
        for architecture, where in registry._VLLM_MODELS.items()
        if architecture not in registry._SPECULATIVE_DECODING_MODELS
    }

    def verdict(name: str, seen: frozenset[str] = frozenset()) -> bool | None:
        node = classes.get(name)
        if node is None or name in seen:
            return None
        seen |= {name}
        if (own := own_head(node)) is not None:
            return own
        inner = [verdict(known.get(other, ""), seen) for other in inner_architectures(node)]
        bases = (verdict(ast.unparse(base).rpartition(".")[2], seen) for base in node.bases)
        found = [v for v in (*inner, *bases) if v is not None]
        return found[0] if found else None

    return sorted(arch for arch, name in known.items() if verdict(name) is False)


def rendered() -> str:
    """The file's text."""
    sources = trees()
    fused = "".join(f"    {parts!r},\n".replace("'", '"') for parts in fused_groups(sources))
    heads = "".join(f'        "{name}",\n' for name in unpackable_heads(sources))
    version = importlib.metadata.version("vllm").partition("+")[0]
    text = HEADING.format(version=version, fused=fused, heads=heads)
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TABLE), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    TABLE.write_text(rendered())
