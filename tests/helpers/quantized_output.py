"""What `precalib quantize` wrote, read without it and held against the source and the manifest."""

import json

import pytest
import torch
from safetensors.torch import load_file

from offline_quantize.checkpoint.manifest import read_manifest
from precalib_kernels.format import reference
from precalib_kernels.format.checkpoint_config import CheckpointConfig

# squared error over squared weights that plain rounding stays below on these weights
BOUND = {2: 0.6, 3: 0.15, 4: 0.04, 5: 0.01}


def load(target):
    """All tensors of a checkpoint as the safetensors library reads them."""
    return {n: t for file in target.glob("*.safetensors") for n, t in load_file(file).items()}


def unpack(target):
    """Every packed weight by module, with nothing but the kernels' package."""
    fields = json.loads((target / "config.json").read_text())["quantization_config"]
    config = CheckpointConfig.from_dict(fields)
    tensors = load(target)
    weights = {}
    for module in config.modules:
        layout = config.layout_of(module)
        columns = tensors[f"{module}.qweight"].shape[1] * 8 // layout.bits
        rows = tensors[f"{module}.qweight"].shape[0]
        names = layout.tensors(rows, columns)
        parts = {name: tensors.pop(f"{module}.{name}") for name in names}
        layout.check(parts, columns, module)
        weights[module] = reference.dequantize(parts, layout, columns)
    return weights, tensors


def relative_error(original, weight):
    original = original.double()
    signal = float(original.square().sum())
    return float((original - weight.double()).square().sum()) / signal if signal else 0.0


def check(source, target):
    """The manifest tells the truth, and kept tensors are the source's; returns the manifest."""
    original, (weights, kept) = load(source), unpack(target)
    manifest = read_manifest(target)
    assert manifest.tensors.keys() == weights.keys()
    for module, weight in weights.items():
        entry, before = manifest.tensors[module], original.pop(f"{module}.weight")
        assert list(entry.shape) == list(before.shape) == list(weight.shape)
        assert weight.isfinite().all()
        error = relative_error(before, weight)
        assert entry.relative_error == pytest.approx(error, rel=1e-3, abs=1e-12)
        assert entry.kl >= 0
        assert 0 <= entry.salient_share <= 1
        assert 0 <= entry.entropy_after <= 8
        assert 0 <= entry.entropy_before <= 8
        stored = sum(t.nbytes for n, t in load(target).items() if n.rpartition(".")[0] == module)
        stored -= sum(t.nbytes for n, t in kept.items() if n.rpartition(".")[0] == module)
        assert entry.bits_per_weight == pytest.approx(8 * stored / before.numel())
    assert original.keys() == kept.keys() == manifest.unquantized.keys()
    for name, tensor in original.items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor.view(torch.uint8), kept[name].view(torch.uint8))
    return manifest
