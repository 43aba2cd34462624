"""Child of `training.py` and `gpu_training.py`: load a model one way, and take a LoRA step for each line on standard
input (see `turns`).

python bench/train_steps.py packed|dense|bf16|nf4 MODEL TOKENS THREADS [cpu|cuda]

MODEL is a GGUF for `packed` (our layers over its blocks) and `dense` (transformers' float32 copy of it), and the folder
with the 16-bit weights for `bf16` and for `nf4` (bitsandbytes' four bits, as QLoRA has them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import ollama_forge.train  # isort: skip  # noqa: F401 - before peft, as in the program
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from turns import serve

from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.recompute import recompute_activations


def load(kind: str, path: Path, device: str) -> PreTrainedModel:
    """The model, on its device."""
    if kind == "packed":
        model = load_packed(path).model
        model.to(device)  # type: ignore[arg-type]
        return model
    if kind == "dense":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    quantization = None
    if kind == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": device}, quantization_config=quantization
    )


def prepare(model: PreTrainedModel, kind: str, n_tokens: int, device: str) -> Callable[[], float]:
    """A function that takes a step and gives its loss."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind == "packed":
        use_packed_lora(config)
        recompute_activations(model)
    else:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the card

    return step


def main() -> None:
    kind, path, n_tokens, n_threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    device = sys.argv[5] if len(sys.argv) > 5 else "cpu"
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    serve(
        lambda: prepare(load(kind, path, device), kind, n_tokens, device),
        torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0,
    )


if __name__ == "__main__":
    main()
