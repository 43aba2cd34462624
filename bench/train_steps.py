"""Child of `training.py`: load a GGUF one way, take some LoRA steps, and print what it took as JSON.

python bench/train_steps.py packed|dense MODEL.gguf TOKENS STEPS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.recompute import spare_last_blocks


def load(kind: str, path: Path) -> PreTrainedModel:
    """Our packed layers, or transformers' dequantized float32 copy."""
    if kind == "packed":
        return load_packed(path).model
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def main() -> None:
    kind, path, n_tokens, n_steps, n_threads = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    began = time.perf_counter()
    model = load(kind, path)
    loaded = time.perf_counter() - began
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind == "packed":
        use_packed_lora(config)
        spare_last_blocks(model)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    seconds = []
    loss = 0.0
    for _ in range(n_steps + 1):
        began = time.perf_counter()
        output = adapted(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()
        del output
        seconds.append(time.perf_counter() - began)
    # The first step also makes the optimizer's state and warms every buffer.
    print(json.dumps({"load": loaded, "step": statistics.median(seconds[1:]), "loss": loss}))


if __name__ == "__main__":
    main()
