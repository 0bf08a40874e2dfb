"""Every row of the table of tested options names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_option_names_its_tests(tables):
    [rows] = tables("serving.md", "Options tested")
    assert rows
    for row in rows:
        found = REFERENCE.findall(row[-1])
        assert found, row
        for file, test in found:
            tree = ast.parse((ROOT / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
