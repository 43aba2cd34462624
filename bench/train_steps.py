"""Child of `training.py`: load a GGUF one way, and take a LoRA step for each line on standard input (see `turns`).

python bench/train_steps.py packed|dense MODEL.gguf TOKENS THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from turns import serve

from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.recompute import spare_last_blocks


def load(kind: str, path: Path) -> PreTrainedModel:
    """Our packed layers, or transformers' dequantized float32 copy."""
    if kind == "packed":
        return load_packed(path).model
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def prepare(model: PreTrainedModel, kind: str, n_tokens: int) -> Callable[[], float]:
    """A function that takes a step and gives its loss."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind == "packed":
        use_packed_lora(config)
        spare_last_blocks(model)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    kind, path, n_tokens, n_threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    serve(lambda: prepare(load(kind, path), kind, n_tokens))


if __name__ == "__main__":
    main()
