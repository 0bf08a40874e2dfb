"""What is said about the speed of the kernels."""

import dataclasses

import pytest
import torch

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.backends.x86.expectation import (
    EXPECTATIONS,
    SLOWER,
    Expectation,
    expectation,
)
from precalib_kernels.format.layout import Layout


def test_every_isa_was_measured_and_none_is_silently_slower_than_unquantized_products():
    assert list(EXPECTATIONS) == [isa.name for isa in library.ISAS]
    for isa, measured in EXPECTATIONS.items():
        slower = max(measured.ratios.values()) > SLOWER
        assert ("; slower at M = " in measured.sentence(isa)) == slower


def test_a_sentence_tells_the_ratios_and_where_they_are_slower():
    measured = Expectation("float32", {1: 0.25, 4: 1.1, 16: 1.25})
    assert measured.sentence("mmx") == (
        "ISA mmx: about .25, 1.10, 1.25 times the time of unquantized float32 products at "
        "M = 1, 4, 16; slower at M = 16"
    )
    faster = dataclasses.replace(measured, ratios={1: 0.25})
    assert faster.sentence("mmx").endswith("products at M = 1")


def test_the_backend_tells_it_for_the_isa_of_the_machine(monkeypatch):
    monkeypatch.setattr(library, "supported_isas", lambda: ("avx2", "avx512"))
    spec = LinearSpec(Layout(bits=4, group_size=128), 160, (32,), torch.bfloat16, "cpu")
    assert X86Backend.expectation(spec) == EXPECTATIONS["avx512"].sentence("avx512")
    assert X86Backend.expectation(dataclasses.replace(spec, dtype=torch.float32)) is None
    with pytest.raises(KeyError):
        expectation("mmx", torch.bfloat16)
