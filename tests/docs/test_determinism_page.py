"""The page on determinism names tests that there are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "determinism.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "test |" not in line]


def test_there_are_rows():
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_a_test(row):
    (named,) = re.findall(r"`(tests/[\w./]+::\w+)`", row)
    path, _, name = named.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
