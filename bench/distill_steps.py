"""Child of `distilling.py`: load teacher and student one way, and take a LoRA distillation step for each line on
standard input (see `turns`).

python bench/distill_steps.py packed|trl TEACHER.gguf STUDENT.gguf TOKENS THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from turns import serve

from ollama_forge.train.distill import install_distill_loss
from ollama_forge.train.distill_options import DistillLoss
from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.recompute import recompute_activations
from ollama_forge.train.teacher import packed_teacher

Step = Callable[[torch.Tensor], torch.Tensor]


def adapted(model: PreTrainedModel, *, is_packed: bool) -> Any:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if is_packed:
        use_packed_lora(config)
        recompute_activations(model)
    else:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, config).train()


def packed_step(teacher_path: Path, student_path: Path) -> tuple[Any, Step]:
    """Ours: both models packed, the loss from hidden states and packed heads."""
    teacher, student = packed_teacher(load_packed(teacher_path)), load_packed(student_path).model
    learner = adapted(student, is_packed=True)
    install_distill_loss(student, DistillLoss())

    def step(ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss: torch.Tensor = learner(**batch, teacher_targets=teacher.targets(batch)).loss
        return loss

    return learner, step


def trl_step(teacher_path: Path, student_path: Path) -> tuple[Any, Step]:
    """TRL's kernel for its distillation trainer, over transformers' dequantized float32 copies."""

    def dense(path: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    teacher, student = dense(teacher_path).eval(), dense(student_path)
    learner = adapted(student, is_packed=False)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            seen = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        head = student.get_output_embeddings()
        weight = getattr(head, "base_layer", head).weight
        divergence, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, seen, teacher.lm_head.weight, None, 0.0)
        return divergence.mean()

    return learner, step


def prepare(kind: str, teacher_path: Path, student_path: Path, n_tokens: int) -> Callable[[], float]:
    """A function that takes a step and gives its loss."""
    learner, compare = (packed_step if kind == "packed" else trl_step)(teacher_path, student_path)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, learner.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = compare(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    kind, teacher_path, student_path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    n_tokens, n_threads = map(int, sys.argv[4:6])
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    serve(lambda: prepare(kind, teacher_path, student_path, n_tokens))


if __name__ == "__main__":
    main()
