"""Experts by the Triton kernels, where Triton's interpreter takes the place of a GPU."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_experts_by_interpreted_kernels(run_suite):
    suite = Path(__file__).with_name("test_experts.py")
    words = ["-m", "pytest", suite, "-k", "grouped and triton"]
    run_suite(words, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
