"""Runs the suites beside it where Triton's interpreter takes the place of a GPU."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["interpreted_suite.py", "interpreted_salient_suite.py"])
def test_kernels_are_the_reference_under_the_interpreter(run_suite, name):
    suite = Path(__file__).with_name(name)
    run_suite(["-m", "pytest", suite], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
