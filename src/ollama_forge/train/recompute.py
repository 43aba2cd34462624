"""What of a model's activations is kept for backward, and what is computed a second time.

Recomputing a block saves memory and costs a third of a step. Within a fixed room, beside the inputs of all blocks and
the one block that is at work, first the products of large matrices are kept (`train.tape`): they cost the most time for
their bytes. What room is left then keeps the last blocks whole. Short batches take few bytes of each, so more is kept.
What is learnt is the same to the bit, and what is kept depends on the batches alone, so a seed gives the same bytes on
every machine.
Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174), section 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ollama_forge.train.options import ACTIVATION_ROOM_BYTES
from ollama_forge.train.packed import PackedLinear
from ollama_forge.train.tape import ProductKeeper

_FLOAT_BYTES = 4


def recompute_activations(model: PreTrainedModel, room_bytes: int = ACTIVATION_ROOM_BYTES) -> RemovableHandle | None:
    """Switch recomputation on; from now on each training pass chooses what it keeps, by its number of tokens.

    Args:
        model: transformers'; its layers may be packed, and may be wrapped by peft.
        room_bytes: for all activations of the blocks together; 0 to keep nothing but the blocks' inputs.

    Returns:
        What takes the choice off again; None when the model's blocks cannot recompute one by one.
    """
    keeper = ProductKeeper()
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": keeper.contexts}
    )
    stack = model.base_model
    blocks = [module for module in stack.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        return None
    width = model.config.get_text_config().hidden_size
    token_bytes = [_token_bytes(block, width) for block in blocks]
    needed_bytes = _FLOAT_BYTES * width * len(blocks) + max(token_bytes)

    def choose(_stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not stack.training or not getattr(stack, "gradient_checkpointing", False):
            return None
        n_tokens = _count_tokens(args, kwargs)
        room = max(0, room_bytes - n_tokens * needed_bytes)
        product_bytes = [_product_bytes(block, keeper) for block in blocks]
        keeper.room_bytes = min(room, n_tokens * sum(product_bytes))
        left = room - n_tokens * sum(product_bytes)
        for number in reversed(range(len(blocks))):
            left -= n_tokens * (token_bytes[number] - product_bytes[number])
            blocks[number].gradient_checkpointing = left < 0
        # blocks that recompute drop the cache by themselves
        return args, {**kwargs, "use_cache": False}

    return stack.register_forward_pre_hook(choose, with_kwargs=True)


def _count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return int(ids.numel())
    shape = kwargs["inputs_embeds"].shape
    return int(shape[0] * shape[1])


def _token_bytes(block: nn.Module, width: int) -> int:
    """What backward needs of a block for each token: what its matrices give and are given, and its norms."""
    linear = (
        module for name, module in block.named_modules() if ".lora_" not in name and isinstance(module, nn.Linear)
    )
    outputs = sum(module.out_features for module in linear)
    return _FLOAT_BYTES * (2 * outputs + 4 * width)


def _product_bytes(block: nn.Module, keeper: ProductKeeper) -> int:
    """What recomputation asks for again, for each token."""
    linear = (module for module in block.modules() if isinstance(module, PackedLinear))
    return _FLOAT_BYTES * sum(module.out_features for module in linear if keeper.is_asked(module.matrix))
