"""docs/supported-models.md, made of what `family_suite.py` found."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/families.json"
PAGE = ROOT / "docs/supported-models.md"
TEMPLATE = Path(__file__).with_name("supported_models_template.md")
# |Δ logprob| in float32 beyond which a packed model would not be the dequantized one.
TOLERANCE = 1e-2


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's text."""
    version = importlib.metadata.version("vllm").partition("+")[0]
    lines = "".join(
        f"| {name} | `{family.model}` | {cells(family.reference, results[name])} |\n"
        for name, family in FAMILIES.items()
    )
    return TEMPLATE.read_text().format(
        version=version,
        transformers=importlib.metadata.version("transformers"),
        tolerance=TOLERANCE,
        lines=lines,
    )


def cells(reference: str, result: Mapping[str, Any]) -> str:
    """The rest of a family's line."""
    if "failed" in result:
        return f"| | {reference} | failed: {result['failed'].strip().splitlines()[-1]}"
    kept = "; ".join(f"`{name}`: {why}" for name, why in result["unquantized"].items())
    shown = "vLLM" if reference == "vllm" else reference
    return f"{result['packed']} | {kept or 'none'} | {shown} | {result['difference']:.0e}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
