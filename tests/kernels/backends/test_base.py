"""What every backend has in common."""

import dataclasses
import json

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS, random_packed

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.reference import ReferenceBackend
from precalib_kernels.backends.registry import BackendRegistry
from precalib_kernels.backends.routes import Grouping, sorted_routes
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.errors import ServingError
from precalib_kernels.format.reference import dequantize


class LinearOnly(ReferenceBackend):
    """Looks up no rows."""

    name = "linear_only"
    can_embed = Backend.can_embed
    embedding = Backend.embedding


BACKENDS = [X86Backend, TritonBackend, ReferenceBackend]
SPEC = LinearSpec(RECIPE_LAYOUTS["balanced-4"], 160, (32, 16), torch.bfloat16, "cpu")


def test_a_spec_knows_its_rows():
    assert SPEC.output_size == 48


def test_a_spec_is_plain_data():
    fields = json.loads(json.dumps(SPEC.to_dict()))
    assert fields.pop("layout") == SPEC.layout.to_dict()
    assert fields == {
        "input_size": 160,
        "shard_sizes": [32, 16],
        "dtype": "bfloat16",
        "device": "cpu",
        "experts": 0,
        "int8_activations": False,
        "embedding": False,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_are_refused_with_a_sentence(device):
    class OneMatrix(ReferenceBackend):
        experts = False

    spec = dataclasses.replace(SPEC, experts=8, device=device)
    assert OneMatrix.can_run(spec) == "computes one matrix per layer, not 8 experts"


def test_the_reference_computes_experts_on_every_device():
    for device in ("cpu", "cuda"):
        assert ReferenceBackend.can_run(dataclasses.replace(SPEC, experts=8, device=device)) is None


def test_who_has_no_grouped_products_says_so():
    backend, x = LinearOnly(SPEC), torch.zeros(1, 64)
    assert not backend.grouped
    grouping = Grouping(sorted_routes(torch.tensor([[0]]), 1, 8), 1)
    with pytest.raises(NotImplementedError, match=r"^linear_only has no grouped products$"):
        backend.apply_grouped(torch.nn.Module(), x, None, grouping)
    with pytest.raises(NotImplementedError, match=r"^linear_only has no grouped products$"):
        backend.route_block(1)
    with pytest.raises(NotImplementedError, match=r"^linear_only has no grouped products$"):
        backend.row_limits()


@pytest.mark.parametrize("backend", [TritonBackend, ReferenceBackend])
def test_who_cannot_round_activations_says_so(backend):
    spec = dataclasses.replace(SPEC, int8_activations=True)
    assert backend.can_run(spec) == "has no 8-bit activations"


def test_who_cannot_look_up_rows_says_so():
    reason = "cannot look up rows of packed embeddings"
    assert LinearOnly.can_embed(SPEC) == reason
    with pytest.raises(NotImplementedError, match=f"^linear_only: {reason}$"):
        LinearOnly(SPEC).embedding(torch.nn.Module(), torch.tensor([0]))
    registry = BackendRegistry((LinearOnly, ReferenceBackend))
    assert registry.choose(SPEC).backend is LinearOnly
    rows = dataclasses.replace(SPEC, embedding=True)
    choice = registry.choose(rows)
    assert choice.backend is ReferenceBackend
    assert choice.reasons == {"linear_only": reason}
    with pytest.raises(ServingError, match=rf"\(linear_only: {reason}\)"):
        registry.choose(rows, "linear_only")


@pytest.mark.parametrize("name", ["balanced-4", "paper-3", "rtn-4"])
@pytest.mark.parametrize("backend", [X86Backend, ReferenceBackend])
def test_rows_are_those_of_the_weight(backend, name):
    layout = RECIPE_LAYOUTS[name]
    spec = LinearSpec(layout, 160, (40,), torch.bfloat16, "cpu", embedding=True)
    if reason := backend.can_run(spec):
        pytest.skip(reason)
    tensors = random_packed(layout, 40, 160, log_codes=64).tensors
    weight = dequantize(tensors, layout, 160).bfloat16()
    made = backend(spec)
    layer = torch.nn.Module()
    for key, tensor in made.prepare(dict(tensors), "test").items():
        layer.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
    assert backend.can_embed(spec) is None
    ids = torch.tensor([[0, 39], [17, 17]])
    rows = made.embedding(layer, ids)
    assert rows.shape == (2, 2, 160)
    assert rows.dtype == torch.bfloat16
    # float32 may be rounded another way before it is rounded to bfloat16
    torch.testing.assert_close(rows, weight[ids], rtol=2.0**-7, atol=1e-6)
    assert (rows == weight[ids]).float().mean() > 0.99
    traced = torch.compile(lambda ids: made.embedding(layer, ids), backend="eager", fullgraph=True)
    assert torch.equal(traced(ids), rows)
