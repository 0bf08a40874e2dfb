"""What conftest.py does to tests: seeds, skips that fail, cases of suites."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow

SKIPS = """
import pytest

def test_no_gpu(): pytest.skip("this machine has no GPU")
def test_no_isa(): pytest.skip("this processor lacks AVX2")
def test_no_browser(): pytest.skip("there is no Chromium to look with")
def test_no_package(): pytest.importorskip("no_such_package")
@pytest.mark.skipif(True, reason="there is no compiler")
def test_no_compiler(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""
MODULE = "import pytest\npytest.importorskip('no_such_package')\ndef test_it(): pass\n"
RANDOM = """
import random, numpy as np, pytest, torch

def draw(): return [random.random(), float(np.random.rand()), float(torch.rand(()))]
@pytest.fixture(scope="session")
def shared(): return draw()
def test_a(shared): pytest.fail(f"<{draw() + shared}>", pytrace=False)
def test_b(shared): pytest.fail(f"<{draw() + shared}>", pytrace=False)
"""
NUMBERS = re.compile("<[^>]*>")
SUITE = """
import os, pytest

def test_good(): assert os.environ["COLOUR"] == "red"
@pytest.mark.parametrize("n", [1, 2])
def test_bad(n): assert n == 1, "the text of a case"
def test_skips(): pytest.skip("this machine has no GPU")
"""
PARENT = """
from pathlib import Path

def test_cases(run_suite):
    run_suite(["-m", "pytest", Path(__file__).with_name("cases_suite.py")], COLOUR="red")
def test_broken(run_suite):
    run_suite(["-c", "import sys; sys.exit('it broke')"])
"""


@pytest.fixture
def outcomes(tmp_path):
    """Runs files under a copy of conftest.py: per test, what became of it and its text."""

    def run(files: dict[str, str], *options: str, **environment: str) -> dict[str, tuple[str, str]]:
        shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        report = tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        clean = {k: v for k, v in os.environ.items() if k not in ("CI", "PRECALIB_NO_SKIP")}
        command += ["--rootdir", str(tmp_path), f"--junitxml={report}"]
        subprocess.run(command, cwd=tmp_path, env=clean | environment, capture_output=True)
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
            text = " ".join([*((child.text or "") for child in bad), *case.itertext()])
            found[case.get("name") or ""] = (bad[0].tag if bad else "passed", text)
        return found

    return run


def test_skips_that_setup_could_have_avoided_fail(outcomes):
    found = outcomes({"test_skips.py": SKIPS}, PRECALIB_NO_SKIP="1")
    assert len(found) == 6
    failing = {name for name, (what, _) in found.items() if what in ("failure", "error")}
    assert failing == {"test_no_package", "test_no_compiler"}
    for name in failing:
        assert f"test_skips.py::{name} would skip: " in found[name][1]


def test_in_ci_there_is_a_browser_and_no_file_skips_whole(outcomes):
    files = {"test_skips.py": SKIPS, "test_module.py": MODULE}
    found = outcomes(files, "--continue-on-collection-errors", PRECALIB_NO_SKIP="1", CI="1")
    assert found["test_no_browser"][0] == "failure"
    assert found["test_no_gpu"][0] == "skipped"
    (text,) = (text for name, (_, text) in found.items() if "module" in name)
    assert "could not import 'no_such_package'" in text


def test_numbers_depend_on_the_name_of_a_test_only(outcomes):
    texts = {}
    for chosen in ("test_", "test_b"):
        for name, (what, text) in outcomes({"test_random.py": RANDOM}, "-k", chosen).items():
            assert what == "failure"
            texts.setdefault(name, set()).add(NUMBERS.search(text)[0])
            assert re.search(r"(?m)^[0-9]+, from test_random.py::" + name, text)
    assert [len(drawn) for drawn in texts.values()] == [1, 1]
    assert texts["test_a"] != texts["test_b"]


def test_cases_of_a_suite_are_reported_one_by_one(outcomes):
    files = {"cases_suite.py": SUITE, "test_parent.py": PARENT}
    found = outcomes(files)
    assert {what for what, _ in found.values()} == {"failure"}
    assert "AssertionError: the text of a case" in found["test_cases"][1]
    assert re.search(r"(?m)^[0-9]+, from .*cases_suite.py::test_bad\[2\]", found["test_cases"][1])
    assert "ended with code 1; its last lines:\nit broke" in found["test_broken"][1]
