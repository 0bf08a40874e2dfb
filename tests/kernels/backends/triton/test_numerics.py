"""Runs the suites beside it where Triton's interpreter takes the place of a GPU."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["", "_salient", "_grouped", "_gather"])
def test_kernels_are_the_reference_under_the_interpreter(run_suite, name):
    suite = Path(__file__).with_name(f"interpreted{name}_suite.py")
    run_suite(["-m", "pytest", suite], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
