"""Links, paths, the generated page, and rules for what users read."""

import ast
import re
from pathlib import Path

import pytest

from offline_quantize.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("kernels/precalib_kernels", "offline_quantize", "vllm_precalib")
DIARY = re.compile(r"quiet minutes|another day|last changes|busier time|the same hour", re.I)
MESSAGES = ("Reading the source checkpoint", "Choosing recipes", "Writing", "Serving")


def test_links_anchors_and_paths(script):
    check = script("check_links")
    found = [f"{p.relative_to(ROOT)}: {what}" for p in check.pages() for what in check.problems(p)]
    assert not found, "\n".join(found)


def test_the_checker_finds_what_is_wrong(script, tmp_path, monkeypatch):
    check = script("check_links")
    (tmp_path / "other.md").write_text("# One `two`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[good](other.md#one-two) [host](https://example.com/x) [self](#me) [gone](gone.md)\n"
        "[no heading](other.md#three) `docs/gone.md` `docs/format.md` `no_such.h` `layout.py`\n"
        "# Me\n"
        "```\n[in code](nowhere.md)\n```\n"
    )
    assert list(check.problems(page)) == [
        "the link gone.md leads nowhere",
        "the link other.md#three names no heading of other.md",
        "there is no docs/gone.md in the repository",
        "there is no file no_such.h in the repository",
    ]


def test_the_command_line_reference_is_current(script):
    page = (ROOT / "docs/cli.md").read_text()
    assert page == script("make_cli").page(app), "run: python docs/make_cli.py"


def test_readme():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert "`make demo`" in text
    assert "`make test`" in text


def test_no_page_is_a_diary(script):
    for page in script("check_links").pages():
        assert not DIARY.search(page.read_text()), page


@pytest.fixture(scope="module")
def product_texts():
    """Every string of the product; a formatted value is a NUL."""
    texts = []
    for folder in PRODUCT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


@pytest.mark.parametrize("heading", MESSAGES)
def test_messages_are_those_of_the_code(heading, tables, product_texts):
    for row in tables("troubleshooting.md", heading)[0]:
        message = re.match(r"`([^`]+)`", row[0])[1]
        pieces = [re.escape(piece) for piece in message.split("…")]
        pattern = re.compile(r"[^`]*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in product_texts), message
