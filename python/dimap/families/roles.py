"""The words by which the family `transformer` tells what a matrix is for: data only.

A name is read by its components behind the first number. One of them names a part of the block
(`ATTENTION`, `MLP`); the last says the role there, with or without `AFFIXES`. What is not said here
is not pruned: routers, norms, embeddings, heads and positions have no word.
"""

from __future__ import annotations

# Parts of a block. Each is searched for in a component, in lower case.
ATTENTION = (
    r"att(?:n|ention)|(?:^|_)att$|(?:^|_)mh[cs]?a\d*$|^w_msa$|^[sx]?ca$|^sa$|^token_mixer$"
    r"|^modulation$"
)
MLP = (
    r"mlp|(?:^|_)ffn?s?\d*(?:_|$)|(?:^|_)ffw(?:_|$)|feed_?forward|densereludense|(?:^|_)moe(?:_|$)"
    r"|experts?(?:_|$)|^channel_mixer$"
)
# Parts of a block that are its MLP, unless they stand in its attention.
WEAK_MLP = r"(?:^|_)inter(?:mediate)?(?:_|$)|(?:^|_)output(?:_query|_text)?$|^linear_?\d*$|^net$"
EXPERTS = r"^(?:local_)?experts$|^(?:input|output)_linear$"

# What is never pruned, nor counted as missed: routers, norms, positions, gates and small parts of
# attention that are no projections of tokens.
NEVER = (
    r"^router|^indexer|^compressor|relative|rel_pos|position|rotary|(?:^|_)pos(?:_|$)|^norm|(?:^|_)norm"
    r"|layer_?norm|embed|adapter|lora_|prompt|bias_mlp|cpb_mlp|meta_mlp|^gate$|expert_gate|per_layer"
    r"|^conv$|conv_module|squeeze|^se$|sampling_offsets|attention_weights|altup|laurel|hyper|lstm|1d$"
    r"|head$|classifier|pooler|message_gate"
)
# What no example of patterns names, in a model whose names have none of the words here.
BESIDE = r"embed|norm|tokens?$|scale|zero|bias|absmax|quant|lora_|head$|classifier|position|(?:^|_)pos(?:_|$)"
# Last components of what stands beside quantized weights: GPTQ, AWQ, bitsandbytes, fp8 and others.
QUANTIZED = (
    r"qweight|qzeros|scales|SCB|absmax|quant_map|weight_packed|weight_scale(?:_inv|_2)?"
    r"|weight_zero_point|W_q|_packed_params"
)
# Beside these stand the other parts of a state-space layer, of a linear attention or of a
# recurrence: nothing there is pruned.
STATE_SPACE = (
    r"a_log|dt_bias|dt_proj|x_proj|(?:q_|k_|v_)?conv_?1d|rg_lru|time_(?:mix|decay)\w*|ssm\w*"
    r"|igate_preact"
)

# What may surround a role's word.
AFFIXES = (
    r"^(?:to|linear|lin|in_proj|proj|projection|project|c|w|fc|self|dense|att|attn|[a-z]2[a-z])_(?=.)",
    r"_(?:proj|projection|lin|linear|dense|layer|fc|conv|head|attn|weight|net|map|global|content|vision"
    r"|text|ln)$",
)
# Components behind the one that says the role.
INNER = ("weight", "linear", "conv", "c", "l", "ln", "base_layer", "fn", "module")

# Leaves that say their role wherever they stand.
PROJ_LEAVES = ("o_proj", "projection", "linear", "to_out")
ATTENTION_LEAVES = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "queries_keys_values", "queries",
    "keys_values", "to_q", "to_k", "to_v", "to_kv", "to_qkv", *PROJ_LEAVES,
)  # fmt: skip
MLP_LEAVES = (
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "linear1", "linear2", "lin1",
    "lin2", "linear_fc1", "linear_fc2", "ffn", "ffn_output", "pwconv1", "pwconv2", "linear_up",
    "linear_down",
)  # fmt: skip

# The words of a role, without affixes, in the order in which the tensors of one layer are ranked.
QKV_SPLIT = (
    ("q", "query", "queries", "wq", "qk", "query_key"),
    ("k", "key", "keys", "wk", "kv", "key_value", "keys_values"),
    ("v", "value", "values", "wv"),
)
# One tensor of all three, or a low-rank step or a gate: a layer of its own.
QKV_ALONE = (
    "qkv", "query_key_value", "queries_keys_values", "wqkv", "in", "c_attn", "qkvs", "pack",
    "wpack", "qkvz", "in_qkv", "attn", "att", "in_proj", "q_a", "q_b", "kv_a", "kv_b",
    "kv_a_proj_with_mqa", "kv_a_with_mqa", "k_b", "v_b", "wq_a", "wq_b", "wkv", "wkv_a", "wkv_b",
    "k_up", "v_up", "kv_down", "kv_up", "q_down", "q_up", "gate", "g", "output_gate", "q_gate",
    "qkvg", "qkvr", "r", "vision", "text",
)  # fmt: skip
PROJ = (
    "o", "out", "output", "wo", "proj", "linear", "projection", "dense", "final", "post",
    "attention_out", "o_a", "o_b", "wo_a", "wo_b", "output_dense", "oproj",
)  # fmt: skip
MLP_SPLIT = (
    ("gate", "w1", "wi_0", "fc1_g", "gate_dense", "w_0"),
    ("up", "w3", "wi_1", "fc1_x", "v1", "linear_v"),
)
MLP_ALONE = (
    "fc1", "fc2", "fc3", "w0", "w2", "w12", "w_1", "w_2", "linear1", "linear2", "lin1", "lin2",
    "dense1", "dense2", "dense_1", "dense_2", "gate_up", "up_gate", "down", "wi", "wo", "fc",
    "proj", "h_to_4h", "4h_to_h", "linear_up", "linear_down", "dense_h_to_4h", "dense_4h_to_h",
    "intermediate", "intermediate_dense", "output_dense", "linear_fc1", "linear_fc2", "ffn",
    "ffn_output", "in", "out", "fc_in", "fc_out", "weights_in", "weights_out", "dense", "input",
    "output", "input_linear", "output_linear", "layer1", "layer2", "layer_1", "layer_2", "linear_1",
    "linear_2", "fc_1", "fc_2", "linear_in", "linear_out", "ff", "expand", "pw1", "pw2", "key",
    "value", "conv1", "conv2", "dense_in", "dense_out", "ffw_layer_1", "ffw_layer_2", "*",
)  # fmt: skip
# Of these, the ones on the way out: they come last in their block.
MLP_OUT = (
    "fc2", "w2", "w_2", "linear2", "lin2", "dense2", "dense_2", "down", "wo", "4h_to_h",
    "dense_4h_to_h", "linear_down", "output", "output_dense", "linear_fc2", "ffn_output", "out",
    "fc_out", "weights_out", "output_linear", "layer2", "layer_2", "linear_2", "fc_2", "linear_out",
    "pw2", "value", "conv2", "dense_out", "c_proj", "ffw_layer_2",
)  # fmt: skip
# Parameters that are no `.weight`.
RAW = (
    r"in_proj_weight|[qkv]_proj_weight|(?:gate_up|up_gate|down|up|gate)_proj|w[123v]1?"
    r"|(?:input|output)_linear"
)
