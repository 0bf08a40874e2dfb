"""A report opened in Chromium, and evaluations to show."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page


@dataclasses.dataclass(frozen=True)
class Opened:
    """A page in a window, and what it told since it was opened.

    complaints: errors, warnings and exceptions it caused;  requests: addresses it asked for.
    """

    page: Page
    complaints: list[str]
    requests: list[str]


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens a file: with a width of the window, a colour scheme, and scripts allowed or not."""
    contexts = []

    def open_file(
        file: Path, width: int = 1280, scheme: Any = "light", scripts: bool = True
    ) -> Opened:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        found = Opened(context.new_page(), [], [])
        found.page.on("console", lambda message: found.complaints.append(message.text))
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(file.as_uri())
        return found

    yield open_file
    for context in contexts:
        context.close()


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Writes a result as `precalib eval --json` does."""

    def write(name: str, directory: Path, recipe: str, bits: float, kl: float, **more: Any) -> Path:
        text: dict[str, Any] = {"of": "prose.txt", "window": 512, "tokens": 4088}
        text |= {"kl_99": 5 * kl, "others_mass": 0.03}
        for key, value in {
            "kl": kl,
            "agreement": 0.8,
            "perplexity": 12.0,
            "original_perplexity": 10.0,
        }.items():
            text |= {key: value, f"{key}_interval": [0.9 * value, 1.1 * value]}
        result = {
            "directory": str(directory),
            "source": "models/original",
            "recipe": recipe,
            "bits_per_weight": bits,
            "dtype": "bfloat16",
            "text": text,
        }
        path = tmp_path / name
        path.write_text(json.dumps(result | more))
        return path

    return write
