"""Which layers are packed, in the names of vLLM and of the checkpoint, fused or not."""

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig
from vllm.config import get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from precalib_kernels.errors import FormatError, ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from vllm_precalib import linear_method
from vllm_precalib.config import PrecalibConfig
from vllm_precalib.linear_method import PrecalibLinearMethod
from vllm_precalib.packed_module import PackedModule
from vllm_precalib.tied_head import TiedHeadMethod
from vllm_precalib.undecided_linear_method import UndecidedLinearMethod

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def config(tiny):
    def make(modules, tied=(), **more):
        layouts = {**tiny.LAYOUTS, **more}
        result = PrecalibConfig(
            CheckpointConfig("test", layouts, modules, ("lm_head",), dict(tied))
        )
        result.packed_modules_mapping = FUSED
        return result

    return make


def test_plain_layers(tiny, config):
    packed = config({"a.down_proj": "row"})
    assert packed.packed_module("a.down_proj") == PackedModule(tiny.ROW, "row", ("a.down_proj",))
    assert packed.packed_module("b.down_proj") is None
    assert packed.packed_module("a.down") is None
    assert packed.packed_module("lm_head") is None


def test_fused_layers_are_named_by_their_parts(tiny, config):
    shards = ("a.q_proj", "a.k_proj", "a.v_proj")
    packed = config(dict.fromkeys(shards, "row"))
    assert packed.packed_module("a.qkv_proj") == PackedModule(tiny.ROW, "row", shards)
    assert packed.packed_module("b.qkv_proj") is None


def test_fused_layers_at_the_root(tiny, config):
    packed = config({"gate_proj": "sign", "up_proj": "sign"})
    assert packed.packed_module("gate_up_proj").shards == ("gate_proj", "up_proj")


def test_layers_fused_in_the_checkpoint(tiny, config):
    packed = config({"a.qkv_proj": "sign"})
    assert packed.packed_module("a.qkv_proj") == PackedModule(tiny.SIGN, "sign", ("a.qkv_proj",))
    packed.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}  # phi-3
    assert packed.packed_module("a.qkv_proj") == PackedModule(tiny.SIGN, "sign", ("a.qkv_proj",))
    assert packed.packed_module("b.qkv_proj") is None


def test_parts_may_use_equal_layouts_of_two_names(tiny, config):
    packed = config({"a.gate_proj": "row", "a.up_proj": "twin"}, twin=copy.copy(tiny.ROW))
    assert packed.packed_module("a.gate_up_proj").layout == tiny.ROW


@pytest.mark.parametrize(
    ("modules", "stored"),
    [
        ({"a.q_proj": "row", "a.k_proj": "sign", "a.v_proj": "row"}, "row sign row"),
        ({"a.q_proj": "row", "a.k_proj": "row"}, "row row kept"),
        ({"a.v_proj": "row"}, "kept kept row"),
    ],
)
def test_parts_stored_differently_are_refused_by_name(config, modules, stored):
    q, k, v = stored.split()
    with pytest.raises(
        ServingError,
        match=rf"^a\.qkv_proj: .* not: a\.q_proj \({q}\), a\.k_proj \({k}\), a\.v_proj \({v}\); "
        "quantize the model again with one recipe for all of them, or --keep all of them$",
    ):
        config(modules).packed_module("a.qkv_proj")


def test_names_follow_the_model_class(tiny, config):
    packed = config({"model.layers.0.fc": "row", "model.visual.fc": "sign"})
    packed.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.visual.": "visual.", "model.": "language_model."})
    )
    assert packed.packed_module("language_model.layers.0.fc").layout == tiny.ROW
    assert packed.packed_module("visual.fc").layout == tiny.SIGN
    assert packed.packed_module("model.layers.0.fc") is None


def test_it_travels_to_other_processes(tiny, config):
    packed = pickle.loads(pickle.dumps(config({"a.fc": "row"})))
    assert packed.packed_module("a.fc").layout == tiny.ROW


def test_from_config_reads_what_the_quantizer_writes(tiny, config):
    checkpoint = config({"a.fc": "min-max"}).checkpoint
    packed = PrecalibConfig.from_config(checkpoint.to_dict())
    assert packed.packed_module("a.fc").layout == tiny.MIN_MAX
    assert packed.get_name() == "precalib"
    types = {torch.bfloat16, torch.float16, torch.float32}
    assert set(packed.get_supported_act_dtypes()) == types


def test_another_version_is_refused(config):
    fields = config({}).checkpoint.to_dict() | {"format_version": 99}
    with pytest.raises(FormatError, match="format_version 99, this precalib reads"):
        PrecalibConfig.from_config(fields)


def test_a_checkpoint_that_is_not_packed_is_quantized_while_it_is_loaded():
    assert PrecalibConfig.get_config_filenames() == []  # then vLLM calls the class without one
    assert not pickle.loads(pickle.dumps(PrecalibConfig())).packed


def test_methods_of_layers(config, rank):
    packed = config({"a.fc": "row"})
    with rank():
        fc = ReplicatedLinear(160, 32, quant_config=packed, prefix="a.fc")
        other = ReplicatedLinear(160, 32, quant_config=packed, prefix="a.other")
        assert isinstance(fc.quant_method, PrecalibLinearMethod)
        assert isinstance(other.quant_method, UndecidedLinearMethod)
        assert packed.get_quant_method(torch.nn.Identity(), "a.attn") is None
        embedding = VocabParallelEmbedding(64, 160, quant_config=packed, prefix="embed")
        assert packed.get_quant_method(embedding, "embed") is None
        head = ParallelLMHead(64, 160, quant_config=packed, prefix="lm_head")
        assert packed.get_quant_method(head, "lm_head") is None


@pytest.mark.parametrize("prefix", ["model.embed_tokens", ""])
def test_packed_embeddings(config, rank, prefix):
    """Some models of vLLM do not tell the layer's name."""
    packed = config({"model.embed_tokens": "row", "model.layers.0.mlp.up_proj": "row"})
    with rank():
        layer = VocabParallelEmbedding(64, 160, quant_config=packed, prefix=prefix)
    assert isinstance(layer.quant_method, PrecalibLinearMethod)
    assert layer.quant_method.prefix == "model.embed_tokens"
    assert packed.choices["model.embed_tokens"].backend.can_embed(layer.quant_method.spec) is None


def test_an_embedding_without_a_name_is_not_guessed_among_several(config, rank):
    packed = config({"a.embed_tokens": "row", "b.embed_tokens": "row"})
    with rank():
        layer = VocabParallelEmbedding(64, 160, quant_config=packed, prefix="")
    assert packed.get_quant_method(layer, "") is None


def test_a_head_is_tied_to_packed_embeddings(config, rank):
    packed = config({"model.embed_tokens": "row"}, tied={"lm_head": "model.embed_tokens"})
    with rank():
        embedding = VocabParallelEmbedding(
            64, 160, quant_config=packed, prefix="model.embed_tokens"
        )
        head = ParallelLMHead(64, 160, quant_config=packed, prefix="lm_head")
        biased = ParallelLMHead(64, 160, bias=True, quant_config=packed, prefix="lm_head")
        plain = VocabParallelEmbedding(64, 160, prefix="model.embed_tokens")
    assert head.tie_weights(embedding) is embedding
    said = r"^lm_head uses the packed tensors of model\.embed_tokens, but .* without --embeddings$"
    for untied, other in ((biased, embedding), (head, plain)):
        with pytest.raises(ServingError, match=said):
            untied.tie_weights(other)
    with pytest.raises(ServingError, match=said):  # where vLLM ties nothing
        head.quant_method.process_weights_after_loading(head)


def test_a_tied_head_may_be_named_from_the_root(config, rank):
    packed = config({"model.embed_tokens": "row"}, tied={"lm_head": "model.embed_tokens"})
    with rank():
        head = ParallelLMHead(64, 160, quant_config=packed, prefix=".lm_head")  # StableLM
    assert isinstance(head.quant_method, TiedHeadMethod)


@pytest.mark.parametrize("modules", [["embed_tokens"], []])
def test_adapters_of_packed_embeddings_are_refused(config, rank, monkeypatch, modules):
    """vLLM reads the weight of the layer, if the model lets adapters change its embeddings."""
    model = SimpleNamespace(embedding_modules=dict.fromkeys(modules, "input_embeddings"))
    monkeypatch.setattr(linear_method, "get_model_architecture", lambda _: (model, "Model"))
    packed = config({"model.embed_tokens": "row"})
    with rank():
        get_current_vllm_config().lora_config = object()
        refused = pytest.raises(
            ServingError, match=r"^model\.embed_tokens: vLLM adds LoRA adapters"
        )
        with refused if modules else contextlib.nullcontext():
            VocabParallelEmbedding(64, 160, quant_config=packed, prefix="model.embed_tokens")


def test_names_of_tied_modules_are_mapped(config):
    packed = config({"model.embed_tokens": "row"}, tied={"lm_head": "model.embed_tokens"})
    packed.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language.model.", "lm_head": "language.head"})
    )
    assert packed.checkpoint.tied == {"language.head": "language.model.embed_tokens"}


def test_a_packed_head_cannot_be_tied(config, rank):
    packed = config({"lm_head": "row"})
    with rank():
        embedding = VocabParallelEmbedding(64, 160, quant_config=packed, prefix="embed")
        head = ParallelLMHead(64, 160, quant_config=packed, prefix="lm_head")
        with pytest.raises(ServingError, match=r"^lm_head is packed, but .* --keep 'lm_head'"):
            head.tie_weights(embedding)


def served(packed, rank, architecture, prefix, runner="generate"):
    """What `get_quant_method` says of a layer of a model of that architecture."""
    hf_config = PretrainedConfig(architectures=[architecture])
    model = SimpleNamespace(hf_config=hf_config, hf_text_config=hf_config, runner_type=runner)
    with rank():
        get_current_vllm_config().model_config = model
        return ReplicatedLinear(160, 32, quant_config=packed, prefix=prefix)


def test_weights_that_vllm_would_change_are_refused(config, rank):
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(
        ServingError, match=rf"^{name} is packed, but vLLM folds a permutation into"
    ):
        served(config({name: "row"}), rank, "K2HorizonForCausalLM", name)
    with pytest.raises(ServingError, match=r"^JinaEmbeddingsV5Model: vLLM adds .* the original$"):
        served(config({name: "row"}), rank, "JinaEmbeddingsV5Model", name)
    served(config({name: "row"}), rank, "LlamaForCausalLM", name)


def test_a_packed_head_that_no_layer_takes_is_refused(config, rank):
    packed = config({"lm_head": "row", "a.fc": "row"})
    packed.get_checkpoint_weight_mapper()  # nothing is known of the model yet
    served(packed, rank, "LlamaForCausalLM", "a.fc")
    with pytest.raises(ServingError, match=r"^lm_head is packed, but vLLM .* without --head$"):
        packed.get_checkpoint_weight_mapper()
    with rank():
        ParallelLMHead(64, 160, quant_config=packed, prefix="lm_head")
    packed.get_checkpoint_weight_mapper()


def test_a_model_for_vectors_needs_no_head(config, rank):
    packed = config({"lm_head": "row", "a.fc": "row"})
    served(packed, rank, "LlamaForCausalLM", "a.fc", runner="pooling")
    packed.get_checkpoint_weight_mapper()


def test_names_are_mapped_with_their_suffix(config):
    packed = config({"gpt_neox.layers.0.a": "row", "embed_out": "row", "b.c": "row"})
    suffix = {"embed_out.weight": "lm_head.weight", "b.c.weight": None}
    packed.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"gpt_neox.": "model."}, orig_to_new_suffix=suffix)
    )
    assert dict(packed.checkpoint.modules) == {"model.layers.0.a": "row", "lm_head": "row"}


@pytest.mark.parametrize("load_format", ["sharded_state", "tensorizer"])
def test_ways_of_loading_without_a_checkpoint_are_refused(config, rank, load_format):
    with (
        rank(load_config=LoadConfig(load_format=load_format)),
        pytest.raises(
            ServingError, match=f"^--load-format {load_format} brings .* leave out --load"
        ),
    ):
        ReplicatedLinear(160, 96, quant_config=config({}), prefix="model.layers.0.mlp.down_proj")
