"""A hook of mkdocs: pages that lie outside of docs/ become part of the site, with their links."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
OUTSIDE = {  # path in the repository to path in the site
    "deploy/README.md": "deploy.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    f"{RESULTS}/README.md": "results/index.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def outside() -> dict[str, str]:
    """All files outside of docs/, by their path in the repository."""
    results = sorted(p for p in (ROOT / RESULTS).iterdir() if p.suffix in (".md", ".png"))
    pages = {f"{RESULTS}/{page.name}": f"results/{page.name}" for page in results}
    return pages | OUTSIDE


def on_files(files: Files, config: Any) -> Files:
    """Add the files."""
    for source, target in outside().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to where their targets lie in the site."""
    places = outside()
    origins = {target: source for source, target in places.items()}
    here = page.file.src_uri
    origin = origins.get(here, f"docs/{here}")

    def move(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        place = places.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(move, markdown)
