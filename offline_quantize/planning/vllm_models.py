"""What vLLM 0.32.0 does with models, as its source says; see `families`.

Written by tests/helpers/vllm_model_table.py; a test compares it with the installed vLLM.
"""

# Names of modules of one parent that some model computes as one layer.
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"),
    ("q_proj", "k_proj", "v_proj", "wq", "wk", "wv"),
    ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"),
    ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
    ("gate_proj", "up_proj", "w1", "w3"),
    ("q_proj", "k_proj", "v_proj", "b_proj"),
    ("q_proj", "k_proj", "v_proj", "f_a_proj"),
    ("q_proj", "k_proj", "v_proj", "g_proj"),
    ("q_proj", "k_proj", "v_proj", "index_qk_proj"),
    ("wq_du", "wk_dv", "wv_dv", "wr_du"),
    ("input_mix_weight_down", "block_inject_weight", "_input_mix_padding"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("c_fc_0", "c_fc_1"),
    ("fc1", "fc3"),
    ("gate_proj", "dense_h_to_4h"),
    ("gate_proj", "up_proj"),
    ("in_proj_b", "in_proj_a"),
    ("in_proj_qkv", "in_proj_z"),
    ("input_mix_weight_down", "block_inject_weight"),
    ("k_proj", "v_proj"),
    ("key_proj", "value_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "k_proj"),
    ("w1", "w3"),
    ("wk", "weights_proj"),
    ("wkv", "wgate"),
    ("wq_a", "wkv"),
)

# Architectures whose output head cannot be packed: vLLM multiplies with the embeddings, or builds
# the head without asking how it is quantized, or changes its weight when it is loaded.
UNPACKABLE_HEADS = frozenset(
    {
        "BailingMoeForCausalLM",
        "BailingMoeV2ForCausalLM",
        "BloomForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "CohereForCausalLM",
        "DeepseekV4ForCausalLM",
        "FalconH1ForCausalLM",
        "FalconMambaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma2Model",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "GptOssForCausalLM",
        "JambaForCausalLM",
        "JambaForSequenceClassification",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "OPTForCausalLM",
        "Plamo3ForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen4ExpForCausalLM",
        "SarvamMoEForCausalLM",
        "Step3TextForCausalLM",
        "Zamba2ForCausalLM",
    }
)
