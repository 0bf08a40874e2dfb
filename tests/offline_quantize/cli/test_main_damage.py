"""JSON files with any damage end a command in a sentence, never in a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYER = "model.layers.0"

values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def edit_somewhere(data, tree):
    """Replace, remove or rename one value somewhere in a JSON tree."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(tree[key], dict | list) and data.draw(st.integers(0, 3)):
            tree = tree[key]
            continue
        change = data.draw(st.sampled_from(["replace", "remove"]))
        if change == "remove":
            del tree[key]
        else:
            tree[key] = data.draw(values)
        return


class Fuzz:
    settings = settings(
        max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )

    @staticmethod
    def damage(data, path, original):
        """Either valid JSON with one odd value or bytes that are none."""
        if data.draw(st.integers(0, 5)):
            tree = json.loads(original)
            edit_somewhere(data, tree)
            path.write_text(json.dumps(tree))
        else:
            raw = bytearray(original)
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(raw)


def refused_or_done(ran):
    """Nothing but 0 and 1 ends a command, and no error is without its sentence."""
    assert ran.code in (0, 1), ran
    assert "Traceback" not in ran.err
    if ran.code == 1:
        assert all(line.strip() for line in ran.err.splitlines())
        assert ran.err
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_any_damage_to_the_source_is_a_sentence(checkpoint, weights, precalib, tmp_path, file):
    tensors = {f"{LAYER}.up_proj.weight": weights()(4, 64), "lm_head.weight": weights()(1, 64)}
    source = checkpoint(tensors=tensors, shards=2, files={}, config={"text_config": {"a": [1]}})
    original = (source / file).read_bytes()

    @Fuzz.settings
    @given(data=st.data())
    def fuzz(data):
        Fuzz.damage(data, source / file, original)
        options = ("--group-size", 64, "--recipe", "rtn-4", "--dry-run")
        refused_or_done(precalib("quantize", source, tmp_path / "target", *options))

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "precalib.json", "model.safetensors.index.json"])
def test_any_damage_to_a_packed_checkpoint_is_a_sentence(
    checkpoint, weights, precalib, quantize, tmp_path, file
):
    tensors = {f"{LAYER}.up_proj.weight": weights()(4, 64), "lm_head.weight": weights()(1, 64)}
    source = checkpoint(tensors=tensors, shards=2, files={})
    options = ("--group-size", 64)
    target = quantize(source, *options)
    original = (target / file).read_bytes()
    counter = iter(range(10**6))

    @Fuzz.settings
    @given(data=st.data())
    def fuzz(data):
        Fuzz.damage(data, target / file, original)
        whole = (target / file).read_bytes() == original
        refused_or_done(precalib("inspect", target))
        ran = refused_or_done(precalib("verify", target, "--against", source))
        assert ran.code == 1 or whole or file == "precalib.json"
        refused_or_done(precalib("quantize", source, target, "--resume", *options))
        refused_or_done(precalib("dequantize", target, tmp_path / str(next(counter))))

    fuzz()
