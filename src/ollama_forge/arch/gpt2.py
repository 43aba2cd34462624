"""GPT-2: learnt positions, biases everywhere, matrices stored [inputs, outputs]. Example: openai-community/gpt2."""

from collections.abc import Mapping
from typing import Any

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.decoder import BLOCK, float32, uint32, weight_and_bias
from ollama_forge.arch.rows import Expectation, Family, HyperRow, Residual, Role, TensorRow, Transform
from ollama_forge.gguf.types import ValueType

_LAYER = "transformer.h.{layer}."


def _matrix(role: Role, hf_name: str, gguf_name: str, residual: Residual) -> tuple[TensorRow, ...]:
    axis = -2 if residual is Residual.WRITES else -1
    row = TensorRow(
        role, _LAYER + hf_name, BLOCK + gguf_name, transform=Transform.TRANSPOSE, residual=residual, residual_axis=axis
    )
    return weight_and_bias(row, bias_is_optional=False)


def _norm(role: Role, hf_name: str, gguf_name: str) -> tuple[TensorRow, ...]:
    return weight_and_bias(TensorRow(role, hf_name, gguf_name), bias_is_optional=False)


def _feed_forward_length(config: ModelConfig) -> int:
    return config.values.get("n_inner") or 4 * config.hidden_size


def turn_back(metadata: Mapping[str, Any], result: dict[str, Any]) -> None:
    """GPT-2 names its inner size only when it is not four times the outer one."""
    inner = metadata.get("feed_forward_length")
    result["n_inner"] = None if inner == 4 * result["n_embd"] else inner
    result["n_ctx"] = result["n_positions"]


FAMILY = Family(
    name="gpt2",
    gguf_architecture="gpt2",
    hf_architectures=("GPT2LMHeadModel",),
    tensors=(
        TensorRow(Role.TOKEN_EMBEDDING, "transformer.wte.weight", "token_embd.weight", residual=Residual.WRITES),
        TensorRow(Role.POSITION_EMBEDDING, "transformer.wpe.weight", "position_embd.weight", residual=Residual.WRITES),
        *_matrix(Role.ATTENTION_QKV, "attn.c_attn.weight", "attn_qkv.weight", Residual.READS),
        *_matrix(Role.ATTENTION_OUTPUT, "attn.c_proj.weight", "attn_output.weight", Residual.WRITES),
        *_matrix(Role.FFN_UP, "mlp.c_fc.weight", "ffn_up.weight", Residual.READS),
        *_matrix(Role.FFN_DOWN, "mlp.c_proj.weight", "ffn_down.weight", Residual.WRITES),
        *_norm(Role.ATTENTION_NORM, _LAYER + "ln_1.weight", BLOCK + "attn_norm.weight"),
        *_norm(Role.FFN_NORM, _LAYER + "ln_2.weight", BLOCK + "ffn_norm.weight"),
        *_norm(Role.OUTPUT_NORM, "transformer.ln_f.weight", "output_norm.weight"),
        TensorRow(Role.OUTPUT, "lm_head.weight", "output.weight", residual=Residual.READS, is_optional=True),
    ),
    hypers=(
        uint32("block_count", "n_layer", "num_hidden_layers", is_required=True),
        uint32("context_length", "n_positions", "n_ctx", "max_position_embeddings", is_required=True),
        uint32("embedding_length", "n_embd", "hidden_size", is_required=True),
        HyperRow("feed_forward_length", ValueType.UINT32, compute=_feed_forward_length),
        uint32("attention.head_count", "n_head", "num_attention_heads", is_required=True),
        float32("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ),
    defaults={
        "vocab_size": 50257,
        "n_positions": lambda config: config.values.get("n_ctx", 1024),
        "n_embd": lambda config: config.values.get("hidden_size", 768),
        "n_layer": lambda config: config.values.get("num_hidden_layers", 12),
        "n_head": lambda config: config.values.get("num_attention_heads", 12),
        "layer_norm_epsilon": 1e-5,
    },
    ignored=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
    has_rope=False,
    expectations=(
        Expectation("activation_function", ("gelu_new", "gelu"), "llama.cpp computes this family with gelu."),
        Expectation("scale_attn_weights", (True,), "llama.cpp scales the scores of this family."),
        Expectation("scale_attn_by_inverse_layer_idx", (False,), "llama.cpp scales the scores of all layers alike."),
        Expectation("add_cross_attention", (False,), "llama.cpp has no cross attention for this family."),
    ),
    turn_back=turn_back,
)
