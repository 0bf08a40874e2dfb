"""The rules that make the benchmark's texts, on small examples of what they must keep and drop."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]

JARGON = """
   Before the chapter it is not read,
   not even prose.

Chapter 4. Jargon\xa0Construction

   Table of Contents

   A paragraph of {jargon}
   on two lines.

   For example:

     “A quotation
     is indented.”

   • a list
   is dropped

   The last one,
   kept too.

Chapter 10. Pronunciation Guide

   After it nothing
   is read.
"""


def test_jargon(load: Load, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "jargon.txt.gz"
    file.write_bytes(gzip.compress(JARGON.encode()))
    monkeypatch.setattr(sys, "argv", ["texts.py", "jargon", str(file)])
    load("texts").main()
    assert capsys.readouterr().out == (
        "A paragraph of jargon on two lines.\n\nThe last one, kept too.\n"
    )


def test_prose_takes_as_much_of_each(load: Load, tmp_path: Path) -> None:
    for name, count in {"short": 2, "long": 9}.items():
        (tmp_path / name).mkdir()
        long = f"{name} text " * 30
        page = f"<p>{long}<pre>code</pre><p>too short<div class='para'>{long} <b>bold</b></div>x"
        for index in range(count):
            (tmp_path / name / f"{index}.html").write_text(page)
    texts = load("texts")
    read = [texts.pages(tmp_path / name) for name in ("long", "short")]
    assert read[1][:3] == [("short text " * 30).strip(), "too short", "short text " * 30 + "bold"]
    paragraphs = texts.prose(read).rstrip("\n").split("\n\n")
    assert [text.split()[0] for text in paragraphs] == ["long"] * 5 + ["short"] * 4
    assert not any("code" in text or "too short" in text for text in paragraphs)


def test_code_is_of_every_second_file(
    load: Load, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    texts = load("texts")
    monkeypatch.setattr(texts, "EXCERPT", 20)
    for name in ("a", "b", "c", "short", "z"):
        lines = [f"{name} = {i}\n" for i in range(3 if name == "short" else 10)]
        (tmp_path / f"{name}.py").write_text("".join(lines))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.py").write_text("x = 1\n" * 99)
    written = []
    for words in ([], ["--others"]):
        monkeypatch.setattr(sys, "argv", ["texts.py", "python", str(tmp_path), *words])
        texts.main()
        written.append(capsys.readouterr().out)
    first = ["".join(f"{name} = {i}\n" for i in (5, 6, 7)) for name in "acz"]  # 6 characters each
    assert written[0] == "\n".join(first)
    assert written[1] == "b = 5\nb = 6\nb = 7\n"  # the short one has no whole excerpt


@pytest.mark.parametrize("tokens", [3, 9])
def test_rest_begins_with_a_line_after_the_tokens(load: Load, source: Path, tokens: int) -> None:
    rest = load("texts").after(source, "one\ntwo\nthree\n", tokens)  # a token for each letter
    assert rest == {3: "two\nthree\n", 9: ""}[tokens]
