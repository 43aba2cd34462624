"""Qwen 3 with experts: each layer routes a token to a few of many feed-forward parts. Example: Qwen/Qwen3-30B-A3B."""

from ollama_forge.arch.decoder import (
    BLOCK,
    HEAD_LENGTHS,
    IGNORED,
    LAYER,
    OTHER_MODALITIES,
    RMS_EPSILON,
    ROPE,
    SIZES,
    attention,
    ends,
    query_key_norms,
    two_norms,
    uint32,
)
from ollama_forge.arch.qwen2 import EXPECTATIONS
from ollama_forge.arch.rows import Expectation, Family, Residual, Role, TensorRow

_EXPERT = LAYER + "mlp.experts.{expert}."
_FUSED = LAYER + "mlp.experts."

EXPERTS = (
    TensorRow(Role.ROUTER, LAYER + "mlp.gate.weight", BLOCK + "ffn_gate_inp.weight", residual=Residual.READS),
    TensorRow(
        Role.EXPERT_DOWN,
        _EXPERT + "down_proj.weight",
        BLOCK + "ffn_down_exps.weight",
        residual=Residual.WRITES,
        residual_axis=-2,
    ),
    TensorRow(Role.EXPERT_GATE, _EXPERT + "gate_proj.weight", BLOCK + "ffn_gate_exps.weight", residual=Residual.READS),
    TensorRow(Role.EXPERT_UP, _EXPERT + "up_proj.weight", BLOCK + "ffn_up_exps.weight", residual=Residual.READS),
)

# transformers 5 keeps the experts of a layer in two stacked tensors.
STACKED = (
    TensorRow(Role.EXPERT_DOWN, _FUSED + "down_proj", BLOCK + "ffn_down_exps.weight"),
    TensorRow(Role.EXPERT_GATE, _FUSED + "gate_up_proj", BLOCK + "ffn_gate_exps.weight", part=(0, 2)),
    TensorRow(Role.EXPERT_UP, _FUSED + "gate_up_proj", BLOCK + "ffn_up_exps.weight", part=(1, 2)),
)

FAMILY = Family(
    name="qwen3_moe",
    gguf_architecture="qwen3moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    tensors=(*ends(), *attention(), *query_key_norms(), *two_norms(), *EXPERTS),
    fused=STACKED,
    hypers=(
        *SIZES,
        *ROPE,
        RMS_EPSILON,
        uint32("expert_count", "num_experts", "num_local_experts", "n_routed_experts", is_required=True),
        uint32("expert_used_count", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", is_required=True),
        *HEAD_LENGTHS,
        uint32("expert_feed_forward_length", "moe_intermediate_size", is_required=True),
    ),
    defaults={
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "num_experts": lambda config: config.values.get("num_local_experts", 128),
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "norm_topk_prob": False,
    },
    ignored=IGNORED,
    skipped=OTHER_MODALITIES,
    expectations=(
        *EXPECTATIONS,
        Expectation("norm_topk_prob", (True,), "llama.cpp always normalizes the weights of the chosen experts."),
        Expectation("decoder_sparse_step", (1,), "llama.cpp expects experts in every layer."),
        Expectation("mlp_only_layers", ([],), "llama.cpp expects experts in every layer."),
    ),
    turn_back=lambda _, result: result.update(norm_topk_prob=True),
)
