"""Layers that are quantized while they are loaded hold what the quantizer writes."""

import copy
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import pytest
import torch
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import RECIPES, for_head
from offline_quantize.planning.options import Options as RecipeOptions
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib import linear_method
from vllm_precalib.config import PrecalibConfig
from vllm_precalib.encoder_pool import EncoderPool, Room, allowed_cores, cpu_quota, own_copy
from vllm_precalib.online_linear_method import OnlineLinearMethod
from vllm_precalib.online_plan import OnlinePlan
from vllm_precalib.online_quantizer import OnlineQuantizer
from vllm_precalib.undecided_linear_method import CheckedLinearMethod

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PREFIX = "model.layers.0.self_attn"
ROWS = {"q": 128, "k": 64, "v": 64}


@pytest.fixture
def ours(rank):
    """`with ours(recipe=…)`: as `rank`, with these options and the reference backend."""

    def make(index=0, of=1, **options):
        precalib = {"backend": "reference", **options}
        return rank(index, of, additional_config={"precalib": precalib})

    return make


def online(fused=FUSED):
    config = PrecalibConfig()
    config.packed_modules_mapping = fused
    return config


def packed(modules, recipe):
    layouts = {recipe: RECIPES[recipe].layout}
    config = PrecalibConfig(CheckpointConfig("test", layouts, dict.fromkeys(modules, recipe)))
    config.packed_modules_mapping = FUSED
    return config


def attention(config):
    return QKVParallelLinear(
        160, 32, 4, 2, bias=False, quant_config=config, prefix=f"{PREFIX}.qkv_proj"
    )


def load(layer, name, tensor, shard=None):
    param = getattr(layer, name)
    param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)


def weight(rows, columns=160):
    return (torch.randn(rows, columns) * 0.02).bfloat16()


@pytest.mark.parametrize("recipe", ["balanced-4", "paper-3"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_holds_its_slice_of_what_the_quantizer_writes(ours, recipe, ranks):
    weights = {part: weight(rows) for part, rows in ROWS.items()}
    encoded = {p: encode(w, RECIPES[recipe], p).tensors for p, w in weights.items()}
    for index in range(ranks):
        with ours(index, ranks, recipe=recipe):
            made = attention(online())
            for part in ROWS:
                load(made, "weight", weights[part], part)
            process(made)
        with ours(index, ranks):
            before = attention(packed([f"{PREFIX}.{part}_proj" for part in ROWS], recipe))
            for part in ROWS:
                for name, tensor in encoded[part].items():
                    load(before, name, tensor, part)
            process(before)
        parameters = dict(made.named_parameters())
        assert parameters.keys() == dict(before.named_parameters()).keys()
        for name, tensor in before.named_parameters():
            assert torch.equal(parameters[name].view(torch.uint8), tensor.view(torch.uint8))


def test_rows_that_vllm_reorders_are_not_reordered_again(ours, monkeypatch):
    """As of Llama 4: its loader does so with unquantized weights, before they arrive here."""
    monkeypatch.setattr(linear_method, "rotary_heads", lambda _: {"q": 4, "k": 2})
    weights = {part: weight(rows) for part, rows in ROWS.items()}
    with ours(recipe="rtn-4"):
        layer = attention(online())
        for part in ROWS:
            load(layer, "weight", weights[part], part)
        process(layer)
    expected = [encode(w, RECIPES["rtn-4"], p).tensors["qweight"] for p, w in weights.items()]
    assert torch.equal(layer.qweight, torch.cat(expected))


def test_a_head_is_quantized_on_demand(ours):
    table = weight(100)
    with ours(head="balanced-4"):
        head = ParallelLMHead(100, 160, quant_config=online(), prefix="lm_head")
        load(head, "weight", table)
        process(head)
        recipe = for_head("balanced-4")[1]
        expected = encode(table, recipe, "head").tensors["qweight"]
        assert torch.equal(head.qweight[:100], expected)
        with pytest.raises(ServingError, match=r"^lm_head: this model's head is a copy of its emb"):
            head.tie_weights(head)
    with ours():
        head = ParallelLMHead(100, 160, quant_config=online(), prefix="lm_head")
    assert not isinstance(head.quant_method, OnlineLinearMethod)


def test_a_reload_makes_it_again(ours):
    with ours():
        layer = attention(online())
        fresh = {name: to_meta_tensor(param) for name, param in layer.named_parameters()}
        for part, rows in ROWS.items():
            load(layer, "weight", weight(rows), part)
        process(layer)
        first = layer.qweight.clone()
        for name in ("qweight", "scales", "row_scale", "salient", "column_scale", "weight"):
            meta = fresh[name]
            layer.register_parameter(name, None)
            layer.register_parameter(
                name, meta if name == "weight" else materialize_meta_tensor(meta)
            )
        for part, rows in ROWS.items():
            load(layer, "weight", weight(rows), part)  # on meta: vLLM counts
        assert not layer.quant_method.encoding
        layer.register_parameter("weight", None)
        layer.register_parameter("weight", materialize_meta_tensor(fresh["weight"]))
        for part, rows in ROWS.items():
            load(layer, "weight", weight(rows), part)
        process(layer)
    assert layer.qweight.shape == first.shape
    assert not torch.equal(layer.qweight, first)


def test_weights_that_do_not_arrive_are_missed(ours):
    with ours():
        layer = attention(online())
        load(layer, "weight", weight(128), "q")
        with pytest.raises(ServingError, match=rf"^{PREFIX}\.k_proj\.weight was not in the check"):
            process(layer)


def test_weights_that_arrive_twice_are_named(ours):
    with ours():
        layer = attention(online())
        load(layer, "weight", weight(64), "k")
        with pytest.raises(
            ServingError, match=rf"^{PREFIX}\.k_proj\.weight is in the checkpoint tw"
        ):
            load(layer, "weight", weight(64), "k")


def test_layers_are_prepared_while_others_are_read(ours):
    """Nothing of the packed tensors is left then; only what the backend made of them."""
    with ours():
        layer = attention(online())
        for part, rows in ROWS.items():
            load(layer, "weight", weight(rows), part)
        for task in layer.quant_method.encoding:
            task.result()
        assert layer.quant_method.prepared["qweight"].shape == (256, 80)
        names = layer.quant_method.names
        assert not sum(layer.get_parameter(name).numel() for name in names)
        process(layer)
        assert layer.qweight.shape == (256, 80)


def test_weights_that_cannot_be_quantized_are_named(ours):
    down = "model.layers.0.mlp.down_proj"

    def loaded(tensor, **options):
        with ours(**options):
            layer = RowParallelLinear(160, 48, bias=False, quant_config=online(), prefix=down)
            load(layer, "weight", tensor)
            process(layer)

    broken = weight(48)
    broken[3, 5] = torch.nan
    with pytest.raises(ServingError, match=rf"^{down}\.weight: weight \[3, 5\] is nan; "):
        loaded(broken)
    huge = torch.full((48, 160), 3e38)
    with pytest.raises(ServingError, match=r'keep": \["down_proj\$"\]'):
        loaded(huge, recipe="rtn-4")


def test_unquantized_layers_are_guarded(ours):
    with ours(keep=["gate_proj|up_proj"]):
        layer = MergedColumnParallelLinear(
            160, [32, 32], bias=False, quant_config=online(), prefix="model.layers.0.m.gate_up_proj"
        )
        assert isinstance(layer.quant_method, CheckedLinearMethod)
        with pytest.raises(ServingError, match=r"gate_up_proj\.weight was not in the checkpoint"):
            process(layer)


def test_embeddings_are_quantized_on_demand(ours):
    table, recipe = weight(100), for_head("balanced-4")[1]
    with ours():
        config = online()
        config.quantizer = OnlineQuantizer(None, {})
        config.quantizer.plan = OnlinePlan(
            RecipeOptions(embeddings="balanced-4"), {"model_type": "llama"}
        )
        layer = VocabParallelEmbedding(100, 160, quant_config=config, prefix="model.embed_tokens")
        load(layer, "weight", table)
        process(layer)
        packed = encode(table, recipe, "head").tensors
        assert torch.equal(layer.qweight[:100], packed["qweight"])
        ids = torch.tensor([3, 99, 0])
        rows = dequantize(packed, recipe.layout, 160)[ids]
        torch.testing.assert_close(layer.quant_method.embedding(layer, ids), rows)


def test_a_head_that_shares_packed_embeddings_is_tied(ours):
    with ours():
        config = online()
        config.quantizer = OnlineQuantizer(None, {})
        tied = {"model_type": "llama", "tie_word_embeddings": True}
        config.quantizer.plan = OnlinePlan(RecipeOptions(embeddings="balanced-4"), tied)
        layer = VocabParallelEmbedding(100, 160, quant_config=config, prefix="model.embed_tokens")
        head = ParallelLMHead(100, 160, quant_config=config, prefix="lm_head")
        assert head.tie_weights(layer) is layer


def test_recipes_for_a_packed_checkpoint_are_refused(ours):
    config = packed(["model.layers.0.mlp.down_proj"], "rtn-4")
    with (
        ours(recipe="rtn-3"),
        pytest.raises(ServingError, match=r'"recipe" .* already packed; leave it out$'),
    ):
        RowParallelLinear(160, 48, quant_config=config, prefix="model.layers.0.mlp.down_proj")


def test_recipes_are_refused_where_the_first_packed_layer_comes_later(ours):
    """As in a model whose experts alone are packed, or that vLLM names otherwise."""
    config = packed(["model.layers.0.mlp.down_proj"], "rtn-4")
    with ours(recipe="rtn-3"), pytest.raises(ServingError, match=r"already packed; leave it out$"):
        RowParallelLinear(160, 48, quant_config=config, prefix="model.layers.0.self_attn.o_proj")


def test_the_pool_ends_with_its_last_result():
    pool = EncoderPool()
    futures = [pool.submit(divmod, number, 5) for number in range(12)]
    assert pool.pool is not None
    assert [pool.result(future) for future in futures] == [divmod(n, 5) for n in range(12)]
    assert pool.pool is None
    assert not pool.result(pool.submit(torch.is_grad_enabled))
    assert isinstance(copy.deepcopy(pool), EncoderPool)
    assert isinstance(pickle.loads(pickle.dumps(pool)), EncoderPool)


def test_few_weights_wait_at_once():
    """By their number and by their bytes; one that is larger than all room goes alone."""
    room, entered = Room(3, 100), []

    def enter(nbytes):
        room.enter(nbytes)
        entered.append(nbytes)

    for sizes, fitting in (([40, 40, 40], 2), ([1, 1, 1, 1], 3), ([1000, 1], 1)):
        entered.clear()
        with ThreadPoolExecutor(1) as bringing:
            done = bringing.submit(lambda sizes=sizes: [enter(size) for size in sizes])
            while len(entered) < fitting:
                time.sleep(0.001)
            with pytest.raises(FutureTimeout):
                done.result(0.05)
            assert entered == sizes[:fitting]
            for number in range(len(sizes)):
                while len(entered) <= number:
                    time.sleep(0.001)
                room.leave(sizes[number])
            done.result(10)
    assert room.free == room.all == (3, 100)


def test_a_weight_counts_with_its_bytes():
    pool = EncoderPool()
    seen = []
    pool.room.enter = seen.append
    pool.result(pool.submit(torch.numel, torch.zeros(3, 5)))
    assert seen == [60]


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", os.cpu_count()), ("250000 100000\n", 3), ("50000 100000\n", 1)],
)
def test_a_container_may_allow_less_time_than_cores(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores
    assert cpu_quota(tmp_path / "none") == os.cpu_count()


def test_the_threads_of_a_pool_compute_alone(monkeypatch):
    """vLLM's worker for CPUs replaces torch.set_num_threads; other threads keep their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    try:
        pool = EncoderPool()
        assert pool.result(pool.submit(torch.get_num_threads)) == 1
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch._C.set_num_threads(before)


def test_a_copy_is_the_encoders_own():
    owners = torch.randn(6, 8, dtype=torch.bfloat16).T  # a view that is not contiguous
    expected = owners.clone()
    copied = own_copy(owners)
    owners.zero_()
    assert torch.equal(copied, expected)
    assert copied.is_contiguous()


def test_all_cores_that_any_thread_may_use():
    assert allowed_cores() >= os.sched_getaffinity(0)
