"""LoRA over packed layers: y = x W^T + b + s (x A^T) B^T, in the memory of one result.

peft writes the same sum as four results of the layer's width. Here the large product is added to the low-rank part
where that lies. It comes last, when all that backward needs is saved: recomputation stops there, and never computes the
last product of a block. The parameters, their names, merging and saving stay peft's.
Source: Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3; rsLoRA changes s only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora

from ollama_forge.train.packed import PackedLinear, multiply_rows


class PackedLoraLinear(lora.Linear):
    """peft's LoRA layer for a `PackedLinear`: the plain case with one result, every other one as peft does it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            adapted: torch.Tensor = super().forward(x, *args, **kwargs)
            return adapted
        base = self.get_base_layer()
        assert isinstance(base, PackedLinear)
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight * self.scaling[adapter]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        elif x.dtype != a.dtype:
            return super().forward(x)
        flat = x.reshape(-1, base.in_features)
        low = torch.mm(self.lora_dropout[adapter](flat), a.t())
        low_rank_part = torch.mm(low, base.matrix.to_rope_order(b, 0).t())
        out = multiply_rows(flat, base.matrix, base.workspace, onto=low_rank_part)
        if base.bias is not None:
            out = out + base.bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], base.out_features)

    def _plain_adapter(self) -> str | None:
        """The one adapter in use, when nothing but A and B takes part in it and nobody watches the base layer."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        base = self.get_base_layer()
        is_watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        has_more = active[0] in self.lora_variant or self.lora_B[active[0]].bias is not None
        return None if is_watched or has_more or not isinstance(base, PackedLinear) else active[0]


def use_packed_lora(config: lora.LoraConfig) -> lora.LoraConfig:
    """Have `get_peft_model` wrap packed layers with `PackedLoraLinear`; other layers stay peft's. Returns `config`."""
    # peft's documented door for layers of one's own (its guide "Working with custom models"), in spite of the name
    config._register_custom_module({PackedLinear: PackedLoraLinear})
    return config
