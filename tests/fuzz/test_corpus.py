"""Every kind of damage ends in one sentence, in every command and when vLLM loads it."""

import re
import time

import pytest
from hostile import (
    Sandbox,
    outcome,
    packed_files,
    source_files,
    use_dequantized,
    use_packed,
    use_source,
)
from hostile_corpus import ENDLESS, PACKED, SOURCE
from hostile_damage import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.commands.verify import verify

SECONDS = 20  # of one case on a busy machine


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return Sandbox(folder / "packed", packed_files(folder / "making"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Sandbox(tmp_path_factory.mktemp("hostile") / "source", source_files())


def damaged(box, change):
    files = dict(box.files)
    change(files)
    assert files != box.files
    return box.damaged(files)


def first_fault(root):
    return next(iter(verify(root, None, NullProgress())), "loads")


@pytest.mark.parametrize("name", PACKED)
def test_packed(packed, name, tmp_path):
    case = PACKED[name]
    begin = time.monotonic()
    with damaged(packed, case.change) as root:
        end, sentence = outcome(lambda: first_fault(root))
        assert re.search(case.said, sentence or end)
        assert end != "loads"
        end, sentence = outcome(lambda: use_dequantized(root, tmp_path / "target"))
        assert end == "refused"
        assert sentence
        assert not (tmp_path / "target").exists()
    assert time.monotonic() - begin < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "dense", "reference"])
def test_served(packed, subtests, backend):
    from hostile_plugin import one_rank, use_plugin

    with one_rank(backend):
        assert use_plugin(packed.root) == "serves"
        for name, case in PACKED.items():
            if case.served is ENDLESS:
                continue
            with subtests.test(name), damaged(packed, case.change) as root:
                end, sentence = outcome(lambda root=root: use_plugin(root))
                assert (end == "refused") == (case.served is not None)
                assert re.search(case.served or "", sentence)


@pytest.mark.parametrize("name", SOURCE)
def test_source(source, name, tmp_path):
    """The same of a source. A tensor of another shape or type may just be another model."""
    begin = time.monotonic()
    with damaged(source, SOURCE[name].change) as root:
        end, sentence = outcome(lambda: use_source(root, tmp_path / "target", write=True))
        assert (end == "refused") == bool(sentence)
        assert end == "refused" or name in HARMLESS
        assert not (tmp_path / "target").exists()
    assert time.monotonic() - begin < SECONDS


HARMLESS = ("another type of the same size", "one more shard", "a run that was broken off")


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_of_packed_checkpoints(packed, random):
    """What `make fuzz` does at length; hypothesis makes what fails here small."""
    with packed.damaged(damage(random, packed.files)) as root:
        end, sentence = outcome(lambda: use_packed(root))
    assert (end == "refused") == bool(sentence)


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_of_sources(source, tmp_path, random):
    with source.damaged(damage(random, source.files)) as root:
        end, sentence = outcome(lambda: use_source(root, tmp_path / "target", write=False))
    assert (end == "refused") == bool(sentence)
