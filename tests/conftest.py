"""What all tests share: seeds, which skips are accepted, suites in processes, real models."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent

# What set-up cannot bring. Every other skip is a failure under PRECALIB_NO_SKIP, see README.md.
ACCEPTED_SKIPS = (
    r"this machine has no GPU",
    r"this machine has a GPU",
    r"this processor (lacks|has) ",
    r"needs? AVX",
    r"there is no Arm emulator",
    r"this machine allows no mounts",
)
NO_BROWSER = r"there is no Chromium"  # `make test` may not install one everywhere; CI has to

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_configure() -> None:
    """Hypothesis has no deadline, which a busy machine misses; in CI its examples are fixed."""
    if importlib.util.find_spec("hypothesis"):  # a bare GPU machine has none
        from hypothesis import settings

        parent = settings.get_profile("ci" if os.environ.get("CI") else "default")
        settings.register_profile("precalib", parent, deadline=None, print_blob=True)
        settings.load_profile("precalib")


def accepted(reason: str) -> bool:
    """Whether a test may skip for this reason here."""
    if not os.environ.get("PRECALIB_NO_SKIP"):
        return True
    patterns = ACCEPTED_SKIPS if os.environ.get("CI") else (*ACCEPTED_SKIPS, NO_BROWSER)
    return any(re.search(pattern, reason) for pattern in patterns)


def refusal(name: str, reason: str) -> str:
    """Text of a failure that would have been a skip."""
    reason = reason.removeprefix("Skipped: ")
    return f"{name} would skip: {reason}\nPRECALIB_NO_SKIP accepts no such reason."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip that is not accepted fails; a failure says which seed its numbers came from."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not accepted(reason):
            report.outcome = "failed"
            report.longrepr = refusal(item.nodeid, reason)
    elif report.failed and "run_suite" not in getattr(item, "fixturenames", ()):
        add = getattr(report.longrepr, "addsection", None)  # absent from a text without traceback
        seed = f"{seed_of(item.nodeid)}, from {item.nodeid}"
        if add:
            add("seed", seed)
        else:
            report.longrepr = f"{report.longreprtext}\n{seed}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that skips while it is imported."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not accepted(reason):
            report.outcome = "failed"
            report.longrepr = refusal(collector.nodeid, reason)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")


def seed_of(name: str) -> int:
    """The same number for the same name, in every process."""
    return zlib.crc32(name.encode())


def seed_everything(name: str) -> None:
    """Random numbers that depend on `name` only."""
    seed = seed_of(name)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeds(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in another order and in the whole suite."""
    seed_everything(request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Fixtures that several tests share draw the same numbers whichever test comes first."""
    if fixturedef.scope != "function":
        seed_everything(f"{fixturedef.argname}[{getattr(request, 'param', '')}]")
    return (yield)


@pytest.fixture
def run_suite(tmp_path: Path, subtests: "pytest.Subtests") -> Callable[..., None]:
    """`run_suite([file, *options], NAME="value")` runs tests in a process of their own.

    file: a test file, run by pytest, or a script that ends in `pytest.main`; the keywords are
    added to the environment. Every case is reported as a subtest, with its own text if it fails.
    """

    def run(words: Sequence[str | Path], **environment: str) -> None:
        report = tmp_path / "cases.xml"
        options = ["-vv", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [sys.executable, *words, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        failures = sum(bool(failure_of(case)) for case in cases)
        for case in cases:
            with subtests.test(case.get("name")):
                if failure := failure_of(case):
                    pytest.fail(failure, pytrace=False)
                if (skipped := case.find("skipped")) is not None:
                    pytest.skip(skipped.get("message", ""))
        if not cases or done.returncode != (1 if failures else 0):
            end = f"ended with code {done.returncode}; its last lines:"
            pytest.fail(f"{end}\n{done.stdout[-4000:]}", pytrace=False)

    return run


def failure_of(case: ElementTree.Element) -> str:
    """Text of a case that failed in pytest's JUnit report, else ""."""
    return "\n".join(child.text or "" for child in case if child.tag in ("failure", "error"))


@pytest.fixture(scope="module")  # not longer: while it runs, nothing else can use asyncio
def chromium() -> Generator["Browser", None, None]:
    """The system's Chromium, headless."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium to look at the page with; run: make chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct in bf16; built once (about a minute) and then reused."""
    directory = ROOT / "demo-output" / "SmolLM2-135M-Instruct"
    script = str(ROOT / "deploy" / "gguf_checkpoint.py")
    command = [sys.executable, script, "smollm2", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"cannot build the real model: {done.stderr.strip()[-2000:]}")
    return directory


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random two-layer llama, sizes as LlamaConfig names them, with a tokenizer of bytes.

    Token 256 begins a text; of the vocabulary of 260 the rest is unused.
    """

    def write(seed: int = 0, **sizes: int) -> Path:
        import torch
        from tiny_models import random_llama
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        begin = 256
        root = tmp_path_factory.mktemp("models") / "source"
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": begin}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)]
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(root)
        tokens = {"bos_token_id": begin, "eos_token_id": None, "pad_token_id": None}
        model = random_llama(seed, vocab_size=260, **tokens, **sizes)
        model.lm_head.weight.data *= 20  # far from uniform
        for parameter in model.model.layers.parameters():
            parameter.data *= 4 if parameter.ndim == 2 else 1
        model.to(torch.bfloat16).save_pretrained(root)
        return root

    return write
