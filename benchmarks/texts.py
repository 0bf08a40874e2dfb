"""Texts for bench-quality from Debian packages, by fixed rules; docs/quality.md has the recipe.

    python benchmarks/texts.py jargon jargon.txt.gz > jargon.txt
    python benchmarks/texts.py prose HTML-FOLDER ... > prose.txt
    python benchmarks/texts.py python FOLDER > code.txt
    python benchmarks/texts.py python FOLDER --others > code-rest.txt
    python benchmarks/texts.py rest MODEL FILE [--tokens 8192] > rest.txt

jargon: chapters 4 to 9 of the Jargon File. Of its paragraphs those at the text's own indentation
with two lines or more, so no headings, contents, lists, examples and quotations; without the
braces around cross-references. prose: the paragraphs of 200 characters and more of the HTML pages,
of each folder as much as of the shortest. python: of every second .py file of a folder (without
its subfolders), from the middle, whole lines of 3,000 characters; --others: of the files between
them. rest: what follows the tokens that are measured.
"""

import argparse
import gzip
import html.parser
import sys
from collections.abc import Iterable
from pathlib import Path

FIRST, AFTER = "Chapter 4. Jargon Construction", "Chapter 10. Pronunciation Guide"
INDENT = "   "
SHORTEST = 200  # characters
EXCERPT = 3000  # characters


def main() -> None:
    """Write the text that is asked for to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("jargon").add_argument("file", type=Path)
    commands.add_parser("prose").add_argument("folder", type=Path, nargs="+")
    python = commands.add_parser("python")
    python.add_argument("folder", type=Path)
    python.add_argument("--others", action="store_true")
    rest = commands.add_parser("rest")
    rest.add_argument("model", type=Path, help="folder with the tokenizer")
    rest.add_argument("file", type=Path)
    rest.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    if arguments.command == "jargon":
        text = jargon(gzip.decompress(arguments.file.read_bytes()).decode())
    elif arguments.command == "prose":
        text = prose([pages(folder) for folder in arguments.folder])
    elif arguments.command == "python":
        text = code(sorted(arguments.folder.glob("*.py"))[arguments.others :: 2])
    else:
        text = after(arguments.model, arguments.file.read_text(), arguments.tokens)
    sys.stdout.write(text)


def jargon(text: str) -> str:
    """The prose of chapters 4 to 9, a line for each paragraph."""
    lines = text.replace("\xa0", " ").splitlines()
    part = "\n".join(lines[lines.index(FIRST) : lines.index(AFTER)])
    found = []
    for paragraph in part.split("\n\n"):
        rows = paragraph.strip("\n").split("\n")
        own = all(row.startswith(INDENT) and row[len(INDENT) :][:1].strip() for row in rows)
        if len(rows) > 1 and own and not rows[0].startswith(INDENT + "•"):
            found.append(" ".join(paragraph.split()).replace("{", "").replace("}", ""))
    return _text(found)


def prose(collections: Iterable[list[str]]) -> str:
    """Paragraphs of all collections, of each as many characters as the smallest has."""
    collections = [[p for p in paragraphs if len(p) >= SHORTEST] for paragraphs in collections]
    share = min(sum(map(len, paragraphs)) for paragraphs in collections)
    found = []
    for paragraphs in collections:
        left = share
        for paragraph in paragraphs:
            if left > 0:
                found.append(paragraph)
            left -= len(paragraph)
    return _text(found)


def code(files: Iterable[Path]) -> str:
    """Lines from the middle of every file that is long enough, EXCERPT characters of each."""
    found = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        left = EXCERPT
        part: list[str] = []
        for line in lines[len(lines) // 2 :]:
            left -= len(line)
            if left < 0:
                found.append("".join(part))
                break
            part.append(line)
    return "\n".join(found)


def pages(folder: Path) -> list[str]:
    """Paragraphs of a folder's HTML pages, in the order of their names."""
    reader = Paragraphs()
    for file in sorted(folder.glob("*.html")):
        reader.feed(file.read_text(errors="replace"))
        reader.end()
    return [text for text in (" ".join(part.split()) for part in reader.found) if text]


class Paragraphs(html.parser.HTMLParser):
    """Collects the text of <p> and of DocBook's <div class="para">."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph begins, or a block of another kind."""
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self.found.append("")
            self.inside = True
        elif tag in ("div", "pre", "ul", "table"):
            self.inside = False

    def handle_endtag(self, tag: str) -> None:
        """A paragraph ends."""
        self.inside = self.inside and tag not in ("p", "div", "body")

    def handle_data(self, data: str) -> None:
        """Text of a paragraph."""
        if self.inside:
            self.found[-1] += data

    def end(self) -> None:
        """A page ends."""
        self.inside = False
        self.reset()


def after(model: Path, text: str, tokens: int) -> str:
    """The lines that begin after so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    place = offsets["offset_mapping"][tokens][0]
    return text[text.index("\n", place) + 1 :]


def _text(paragraphs: Iterable[str]) -> str:
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
