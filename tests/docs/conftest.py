import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def script():
    """Loads a script of docs/ as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tables():
    """The tables under a heading of a page in docs/: lists of rows, each a list of cells."""

    def read(page, heading):
        text = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        found = [[]]
        for line in text.splitlines():
            if line.startswith("|"):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
            elif found[-1]:
                found.append([])
        return [table[2:] for table in found if table]

    return read
