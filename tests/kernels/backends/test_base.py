"""What every backend has in common."""

import dataclasses
import json

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.reference import ReferenceBackend
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.x86.backend import X86Backend

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
        "experts": 1,
        "int8_activations": False,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_are_refused_with_a_sentence(backend, device):
    spec = dataclasses.replace(SPEC, experts=8, device=device)
    assert backend.can_run(spec) == "computes one matrix per layer, not 8 experts"


@pytest.mark.parametrize("backend", [TritonBackend, ReferenceBackend])
def test_who_cannot_round_activations_says_so(backend):
    spec = dataclasses.replace(SPEC, int8_activations=True)
    assert backend.can_run(spec) == "has no 8-bit activations"


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_are_refused_with_the_reason(backend):
    reason = f"backend {backend.name} cannot look up rows of packed embeddings"
    assert backend.can_embed(SPEC) == reason
    with pytest.raises(NotImplementedError, match=reason):
        backend(SPEC).embedding(torch.nn.Module(), torch.tensor([0]))
