"""What the quantizer knows of vLLM's models is what the installed vLLM says."""

import ast

import pytest
import vllm_model_table
from vllm.model_executor.models import registry

from offline_quantize.planning import families
from offline_quantize.planning.vllm_models import FUSED, UNPACKABLE_HEADS

# Every function of vLLM's models that changes tensors while it loads them, and why packed linear
# weights are none of its business, or what was done about it.
EXPERTS = "experts and routers only"
OTHER = "no linear weight of the language model: sinks, norms, convolutions, scales, biases"
TOWER = "vision or audio tower"
DRAFT = "a draft model's own weights"
FOREIGN = "other names of tensors: another checkpoint format"
KEPT = "families.REWRITES keeps these weights"
LOADERS = {
    "bagel.load_weights": TOWER,
    "bailing_moe._normalize_lm_head": "families.UNPACKABLE_HEADS",
    "bailing_moe_v3._load_a_log": OTHER,
    "bailing_moe_v3._pad_block_fp8_mlp_checkpoint_tensor": FOREIGN,
    "bert_with_rope.jina_merge_lora_weights": FOREIGN,
    "bert_with_rope.split_up_gate_proj": KEPT,
    "bert_with_rope.weight_loader": EXPERTS,
    "bloom._repack_qkv": KEPT,
    "dbrx.weight_loader": EXPERTS,
    "deepseek_v2._try_load_fp8_indexer_wk": FOREIGN,
    "ernie45_moe._preprocess": EXPERTS,
    "ernie45_vl_moe.load_weights": EXPERTS,
    "falcon.load_weights": "reorders every tensor that has rows",
    "gpt2._transpose_conv1d": "the quantizer refuses models that store weights transposed",
    "gpt_oss._copy_to_expert": EXPERTS,
    "gpt_oss._load_packed_expert": EXPERTS,
    "gpt_oss._load_unquantized_expert": EXPERTS,
    "gpt_oss._load_weights_mxfp4": EXPERTS,
    "gpt_oss._load_weights_other": EXPERTS,
    "gpt_oss._load_weights_quark": EXPERTS,
    "gpt_oss._narrow_for_rank": EXPERTS,
    "granitemoehybrid.load_weights": EXPERTS,
    "jina._load_jina_v5_weights": "families.REFUSED",
    "jina._merge_weights": "families.REFUSED",
    "k2_horizon.load_weights": KEPT,
    "laguna._slice_sink": OTHER,
    "llama4.load_moe_expert_weights": EXPERTS,
    "llama4.load_weights": EXPERTS,
    "llama4.permute_qk_weight_for_rotary": "vllm_precalib.row_order",
    "llama_eagle3.load_weights": DRAFT,
    "longcat_flash_ngram.load_weight": OTHER,
    "mimo_v2.load_weights": OTHER,
    "mimo_v2_mtp.load_weights": DRAFT,
    "mistral.maybe_remap_mistral": FOREIGN,
    "mllama4._consolidate_qkv_weights": TOWER,
    "molmo._get_weights_with_merged_embedding": OTHER,
    "molmo2._get_weights_with_merged_embedding": OTHER,
    "openai_privacy_filter._interleave_gate_up_concat_to_pairs": EXPERTS,
    "openpangu.weight_loader": OTHER,
    "openpangu_vl._padding_weight": TOWER,
    "openpangu_vl.load_weights": TOWER,
    "qwen3_dflash._preprocess": DRAFT,
    "qwen3_eagle3.load_weights": DRAFT,
    "step3_text.load_weights": KEPT,
    "step3p5.load_weights": EXPERTS,
    "telechat2._split_key_value": KEPT,
}
# Models whose code is written for one kind of GPU each, all of them large mixtures; not examined,
# and docs/supported-models.md says so.
OF_ONE_PLATFORM = {
    *("deepseek_v32", "deepseek_v4", "deepseek_v41", "dots3_note", "glm5next", "hy_v4", "inkling"),
    *("kimi_k3", "minimax_m3", "qwen4_exp"),
}
CHANGES = {  # methods and functions of torch that change a tensor's values, order or shape
    *("permute", "transpose", "t", "view", "reshape", "flatten", "unflatten", "movedim"),
    *("chunk", "split", "tensor_split", "narrow", "cat", "stack", "hstack", "vstack"),
    *("repeat", "expand", "repeat_interleave", "flip", "roll", "index_select", "pad"),
    *("normalize", "mul", "mul_", "div_", "matmul", "unsqueeze", "squeeze"),
}
TENSORS = {"loaded_weight", "weight", "tensor", "w"}


def loads(function: ast.FunctionDef) -> bool:
    given = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    about = any(word in function.name for word in ("weight", "rename", "remap"))
    return (
        "load" in function.name
        or bool(given & {"weights", "loaded_weight", "state_dict"})
        or (about and bool(given & TENSORS))
    )


def changes_tensors(function: ast.FunctionDef) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on_text = isinstance(node.func.value, ast.Constant) or (
                isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("name", "key", "weight_name", "parts")
            )
            dots = "'.'" in ast.unparse(node)
            if node.func.attr in CHANGES and not on_text and not dots:
                return True
        if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div | ast.Add):
            names = {n.id for n in (node.left, node.right) if isinstance(n, ast.Name)}
            if names & TENSORS:
                return True
    return False


@pytest.fixture(scope="module")
def sources():
    return vllm_model_table.trees()


def test_every_loader_that_changes_tensors_was_looked_at(sources):
    found = {
        f"{file}.{node.name}"
        for file, tree in sources.items()
        if file.partition("/")[0] not in OF_ONE_PLATFORM
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and loads(node) and changes_tensors(node)
    }
    assert found == set(LOADERS)


def test_the_table_is_that_of_the_installed_vllm():
    again = "run: python tests/helpers/vllm_model_table.py"
    assert vllm_model_table.TABLE.read_text() == vllm_model_table.rendered(), again


def test_architectures_of_our_own_tables_exist():
    named = {name for rewrite in families.REWRITES for name in rewrite.architectures}
    transformers_names = {"BloomModel", "NewModel", "NewForSequenceClassification"}
    assert named - transformers_names | set(families.REFUSED) <= set(registry._VLLM_MODELS)


@pytest.mark.parametrize(
    "group",
    [("q_proj", "k_proj", "v_proj"), ("in_proj_b", "in_proj_a"), ("query", "key", "value")],
)
def test_well_known_groups_are_found(group):
    assert group in FUSED


def test_heads_that_can_be_packed_are_not_in_the_table():
    assert not UNPACKABLE_HEADS & {"LlamaForCausalLM", "Gemma3ForCausalLM", "FalconForCausalLM"}
