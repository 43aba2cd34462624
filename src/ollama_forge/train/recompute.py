"""Which blocks of a model compute their activations a second time in backward: all but the last few.

Recomputing saves memory and costs a third of a step. The last blocks keep their activations, as many of them as fit
into a fixed room beside the inputs of all blocks and the one block that is at work: short batches take few bytes of
each, so more blocks are spared. What is learnt is the same
to the bit, and how many are spared depends on the batch alone, so a seed gives the same bytes on every machine.
Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174), section 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ollama_forge.train.options import ACTIVATION_ROOM_BYTES

_FLOAT_BYTES = 4


def spare_last_blocks(model: PreTrainedModel, room_bytes: int = ACTIVATION_ROOM_BYTES) -> RemovableHandle | None:
    """From now on each training pass chooses, by its number of tokens, the blocks that keep their activations.

    Args:
        model: transformers', with gradient checkpointing on or to be switched on later; without it nothing changes.
        room_bytes: for all activations of the blocks together.

    Returns:
        What takes the choice off again; None when the model's blocks cannot recompute.
    """
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
        left = room_bytes - n_tokens * needed_bytes
        for block, per_token in zip(reversed(blocks), reversed(token_bytes), strict=True):
            left -= n_tokens * per_token
            block.gradient_checkpointing = left < 0
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
