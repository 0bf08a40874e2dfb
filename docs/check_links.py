"""Checks the Markdown files of the repository: relative links, anchors and paths in code spans.

    python docs/check_links.py

It prints what is wrong and needs neither a network nor a package. Links to other hosts are not
followed.
"""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
# A code span is a path of the repository if it begins with one of its top folders.
PATH = re.compile(
    r"(?:kernels|offline_quantize|vllm_precalib|benchmarks|deploy|tests|docs)/[\w./-]*"
)
# A span that looks like a source file is the end of some path in the repository.
FILE = re.compile(r"[\w./]+\.(?:py|h|cpp|sh)")
OF_OTHERS = {"sitecustomize.py"}  # files that pages name and other projects have


@functools.cache
def listed() -> tuple[str, ...]:
    """Files that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(line for line in sorted(set(output.splitlines())) if (ROOT / line).exists())


def pages() -> list[Path]:
    """The Markdown files among them."""
    return [ROOT / line for line in listed() if line.endswith(".md")]


def problems(page: Path) -> Iterator[str]:
    """What is wrong with the links and paths of one page."""
    text = FENCE.sub("", page.read_text())
    for link in LINK.findall(CODE.sub("", text)):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield f"the link {link} leads nowhere"
        elif anchor and anchor not in anchors(file):
            yield f"the link {link} names no heading of {file.name}"
    for span in CODE.findall(text):
        if span in OF_OTHERS or (page.parent / span).exists():
            continue
        if PATH.fullmatch(span) and not (ROOT / span).exists():
            yield f"there is no {span} in the repository"
        elif FILE.fullmatch(span) and not any(path.endswith(span) for path in listed()):
            yield f"there is no file {span} in the repository"


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and mkdocs make them."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


def main() -> None:
    """Check every page; exit code 1 if anything is wrong."""
    found = [f"{page.relative_to(ROOT)}: {what}" for page in pages() for what in problems(page)]
    for line in found:
        print(line)
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
