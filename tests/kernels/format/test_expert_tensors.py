"""3-D tensors of experts, and what quantization_config says about them."""

import pytest
import torch

from precalib_kernels.errors import FormatError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.expert_tensors import ExpertTensor
from precalib_kernels.format.layout import Layout

LAYOUT = Layout(bits=4, group_size=64)
TENSOR = ExpertTensor((2, 6, 64), "a.experts", ("gate_proj", "up_proj"))
NAMES = ["a.experts.0.gate_proj", "a.experts.0.up_proj"]
NAMES += ["a.experts.1.gate_proj", "a.experts.1.up_proj"]


def config(**fields):
    modules = dict.fromkeys(NAMES, "x")
    made = CheckpointConfig("r", {"x": LAYOUT}, modules, (), {}, {"a.experts.gate_up_proj": TENSOR})
    return made.to_dict() | fields


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_make_the_tensor(transposed):
    whole = torch.randn(2, 6, 64)
    matrices = dict(zip(NAMES, whole.view(4, 3, 64), strict=True))
    stored = whole.transpose(1, 2).contiguous() if transposed else whole
    tensor = ExpertTensor(tuple(stored.shape), TENSOR.prefix, TENSOR.modules, transposed)
    assert [part.module for part in tensor.parts()] == NAMES
    assert tensor.part_shape == (3, 64)
    assert torch.equal(tensor.assemble(matrices.__getitem__, torch.float32), stored)
    assert ExpertTensor.from_dict(tensor.to_dict()) == tensor


def test_the_configuration_comes_back():
    fields = config()
    assert CheckpointConfig.from_dict(fields).to_dict() == fields
    assert fields["layouts"]["required"] == {"expert_tensors": True}
    plain = CheckpointConfig("r", {"x": LAYOUT}, {}).to_dict()
    assert "expert_tensors" not in plain
    assert list(plain["layouts"]) == ["x"]


def test_readers_that_know_no_optional_key_refuse_the_checkpoint():
    """They take what names the key for a layout."""
    with pytest.raises(FormatError, match="field 'expert_tensors' is not known to format version"):
        Layout.from_dict(config()["layouts"]["required"])


def test_a_required_key_of_the_future_is_refused():
    fields = config()
    fields["layouts"]["required"]["tied"] = True
    with pytest.raises(FormatError, match="needs a reader that knows the key 'tied'; install the"):
        CheckpointConfig.from_dict(fields)


GOOD = TENSOR.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "'expert_tensors' is not an object"),
        ({"t": 3}, "expert tensor 't' is not an object"),
        ({"t": {}}, "does not describe a tensor of experts"),
        ({"t": GOOD | {"more": 1}}, "does not describe a tensor of experts"),
        ({"t": GOOD | {"transposed": 1}}, "does not describe a tensor of experts"),
        ({"t": GOOD | {"shape": [2, 5, 64]}}, "cannot be that of the modules"),
        ({"t": GOOD | {"shape": [2, 64]}}, "cannot be that of the modules"),
        ({"t": GOOD | {"shape": [2, 6, -1]}}, "cannot be that of the modules"),
        ({"t": GOOD | {"shape": [True, 6, 64]}}, "cannot be that of the modules"),
        ({"t": GOOD | {"modules": []}}, "cannot be that of the modules"),
        ({"t": GOOD | {"modules": [1, 2]}}, "cannot be that of the modules"),
        ({"t": GOOD | {"shape": [10**18, 6, 64]}}, "has more experts than are packed"),
        ({"t": GOOD | {"shape": [3, 6, 64]}}, r"made of 'a\.experts\.2\.gate_proj', which is not"),
    ],
)
def test_what_is_damaged_is_refused(value, message):
    with pytest.raises(FormatError, match=rf"^quantization_config: .*{message}"):
        CheckpointConfig.from_dict(config(expert_tensors=value))
