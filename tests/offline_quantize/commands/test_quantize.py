"""What `precalib quantize` writes, for every recipe and for awkward weights."""

import pytest
import torch
from quantized_output import BOUND, check, load, unpack

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.method.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(checkpoint, quantize, recipe):
    source = checkpoint()
    manifest = check(source, target := quantize(source, "--recipe", recipe))
    bits = RECIPES[recipe].layout.bits
    errors = [tensor.relative_error for tensor in manifest.tensors.values()]
    assert max(errors) < BOUND[bits]
    totals = manifest.totals
    assert totals.bits_per_weight == pytest.approx(8 * totals.stored_bytes / totals.weights)
    assert min(errors) <= totals.mean_relative_error <= max(errors)
    for name in ("tokenizer.json", "code/deep/bytes.txt"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_balanced_is_better_than_rounding(checkpoint, quantize):
    source = checkpoint()
    for bits in (3, 4):
        errors = {}
        for recipe in (f"balanced-{bits}", f"rtn-{bits}"):
            target = quantize(source, "--recipe", recipe, target=recipe)
            errors[recipe] = read_manifest(target).totals.mean_relative_error
        assert errors[f"balanced-{bits}"] < 0.8 * errors[f"rtn-{bits}"]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", ["rtn", "balanced", "paper"])
def test_bits_and_group_sizes(checkpoint, weights, quantize, family, bits, group_size):
    make = weights()
    tensors = {
        "model.layers.0.mlp.up_proj.weight": make(24, 256),
        "model.layers.0.mlp.down_proj.weight": make(8, 352),  # ragged with 64, 128 and 256
    }
    source = checkpoint(tensors=tensors)
    options = ["--recipe", f"{family}-4", "--bits", bits, "--group-size", group_size]
    manifest = check(source, quantize(source, *options))
    for tensor in manifest.tensors.values():
        assert tensor.relative_error < 2 * BOUND[bits]


@pytest.mark.parametrize("recipe", ["balanced-4", "paper-4", "paper-3"])
@pytest.mark.parametrize("alpha", [0, 0.01, 0.12])
def test_shares_of_salient_weights(checkpoint, weights, quantize, recipe, alpha):
    source = checkpoint(tensors={"model.layers.0.up_proj.weight": weights()(64, 256)})
    manifest = check(source, quantize(source, "--recipe", recipe, "--alpha", alpha))
    for tensor in manifest.tensors.values():
        assert tensor.salient_share == pytest.approx(alpha, abs=0.012 + 0.2 * alpha)


@pytest.mark.parametrize("recipe", ["balanced-3", "paper-3"])
@pytest.mark.parametrize("salient_bits", [3, 8])
def test_bits_of_salient_codes(checkpoint, quantize, recipe, salient_bits):
    source = checkpoint()
    target = quantize(source, "--recipe", recipe, "--salient-bits", salient_bits)
    manifest = check(source, target)
    assert manifest.totals.mean_relative_error < BOUND[3]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_types(checkpoint, weights, quantize, recipe, dtype):
    source = checkpoint(tensors=weights(dtype).llama(1))
    check(source, quantize(source, "--recipe", recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_awkward_weights(checkpoint, weights, quantize, recipe):
    make = weights()
    zero_rows, zero_columns, one = make(16, 160), make(16, 160), torch.zeros(16, 160).bfloat16()
    zero_rows[3:9] = 0
    zero_columns[:, 20:140] = 0
    one[5, 159] = 0.5
    outlier = make(16, 160)
    outlier[2, 7], outlier[9, 150] = 30, -20
    awkward = {
        "zero_rows": zero_rows,
        "zero_columns": zero_columns,
        "all_zero": torch.zeros(16, 160).bfloat16(),
        "one": one,
        "constant": torch.full((16, 160), -0.25).bfloat16(),
        "positive": make(16, 160).abs() + 0.1,
        "outlier": outlier,
        "large": make(16, 160) * 1e5,
        "small": make(16, 160) * 1e-2,
        "one_row": make(1, 160),
        "one_group": make(16, 128),
    }
    tensors = {f"model.layers.0.{name}.weight": tensor for name, tensor in awkward.items()}
    source = checkpoint(tensors=tensors)
    manifest = check(source, quantize(source, "--recipe", recipe))
    bits = RECIPES[recipe].layout.bits
    errors = {module[15:]: t.relative_error for module, t in manifest.tensors.items()}
    assert errors.pop("all_zero") == 0
    for name in ("zero_rows", "zero_columns", "large", "small", "one_row", "one_group"):
        assert errors[name] < 2 * BOUND[bits], name
    assert max(errors.values()) < 0.5, errors
    weights_after, _ = unpack(source.with_name("target"))
    assert not weights_after["model.layers.0.all_zero"].any()
    assert not weights_after["model.layers.0.zero_rows"][3:9].any()


FAMILIES = {
    "mixtral": (
        ["block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"],
        ["block_sparse_moe.experts.{e}.w2"],
        ["block_sparse_moe.gate"],
    ),
    "qwen3-moe": (
        ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
        ["mlp.experts.{e}.down_proj"],
        ["mlp.gate"],
    ),
    "deepseek": (
        ["mlp.experts.{e}.gate_proj", "mlp.shared_experts.up_proj", "self_attn.q_a_proj"],
        ["mlp.shared_experts.down_proj"],
        ["mlp.gate"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mixtures_of_experts(checkpoint, weights, quantize, family):
    wide, narrow, gates = FAMILIES[family]
    make, tensors = weights(), {}
    for layer in (0, 1):
        for names, shape in ((wide, (64, 128)), (narrow, (128, 64)), (gates, (4, 128))):
            for name in {n.format(e=e) for n in names for e in range(4)}:
                tensors[f"model.layers.{layer}.{name}.weight"] = make(*shape)
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = make(4)
    source = checkpoint(tensors=tensors)
    manifest = check(source, quantize(source, "--group-size", 64))
    assert manifest.unquantized.keys() == {name for name in tensors if "gate." in name}
    assert len(manifest.tensors) + len(manifest.unquantized) == len(tensors)


def test_equal_runs_give_equal_bytes(checkpoint, quantize, contents):
    first, second = (checkpoint(name, shards=2) for name in ("one", "two"))
    assert contents(quantize(first, target="a")) == contents(quantize(second, target="b"))


def test_the_manifest_lists_every_file(checkpoint, quantize, contents):
    target = quantize(checkpoint(shards=2))
    files = read_manifest(target).files
    digests = contents(target)
    del digests["precalib.json"], digests["README.md"]  # the card names the manifest's digest
    assert {name: file.sha256 for name, file in files.items()} == digests
    assert all(file.size == (target / name).stat().st_size for name, file in files.items())


def test_paper_counts_what_finds_no_place(checkpoint, weights, quantize):
    tensor = weights()(64, 256)
    tensor[:, :128] *= 0.01  # then all of the salient weights lie in every other group
    source = checkpoint(tensors={"model.layers.0.up_proj.weight": tensor})
    manifest = check(source, quantize(source, "--recipe", "paper-4", "--alpha", 0.1))
    (entry,) = manifest.tensors.values()
    assert entry.salient_overflow > 0
    assert manifest.totals.salient_overflow == entry.salient_overflow
    wanted = entry.salient_share * 64 * 256 + entry.salient_overflow
    assert wanted == pytest.approx(0.1 * 64 * 256, rel=0.05)


def test_a_tied_model_without_an_output_head(checkpoint, weights, quantize):
    tensors = weights().llama()
    del tensors["lm_head.weight"]
    config = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    target = quantize(checkpoint(tensors=tensors, config=config))
    assert open_packed(target).files.config["tie_word_embeddings"] is True
    assert "lm_head" not in open_packed(target).config.kept


def test_everything_else_is_copied_byte_for_byte(checkpoint, weights, quantize):
    make = weights()
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": make(64, 128),
        "model.layers.2.mlp.up_proj.weight": make(64, 128),  # past the last of two layers
        "visual.blocks.0.attn.qkv.weight": make(64, 128),
        "model.layers.0.mlp.experts.up_proj": make(4, 64, 128),
        "model.layers.0.mlp.none.weight": make(0, 128),
        "model.embed_tokens.weight": make(48, 128).to(torch.float8_e4m3fn),
        "model.embed_tokens.weight_scale": torch.ones(48, 1).to(torch.float8_e8m0fnu),
        "nan": torch.full((3,), float("nan"), dtype=torch.float64),
        "scalar": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j]),
        "é/ü name": torch.arange(5, dtype=torch.int16),
    }
    source = checkpoint(tensors=make.llama() | extra, shards=2)
    target = quantize(source, "--group-size", 64)
    original, copies = load(source), load(target)
    assert len(read_manifest(target).tensors) == 14
    for name in extra:
        assert (copies[name].dtype, copies[name].shape) == (
            original[name].dtype,
            original[name].shape,
        )
        assert bytes_of(copies[name]) == bytes_of(original[name])


def bytes_of(tensor):
    return bytes(tensor.flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1e-21, 1e-38])
@pytest.mark.parametrize("count", [1, 2, 80])
def test_dead_columns_do_no_harm(checkpoint, weights, quantize, recipe, size, count):
    weight = weights(torch.float32)(64, 160)
    weight[:, :count] *= 50 * size
    source = checkpoint(tensors={"model.layers.0.mlp.down_proj.weight": weight})
    manifest = check(source, quantize(source, "--recipe", recipe))
    assert manifest.totals.mean_relative_error < BOUND[RECIPES[recipe].layout.bits]
