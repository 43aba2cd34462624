"""Batches for a distillation: rows padded together, and prompts that the student answers itself.

In: token rows. Out: the tensors of a `teacher.Batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ollama_forge.dataset.tokenize import Tokenized

IGNORED = -100
"""Label of a position without loss."""


def answer_itself(
    model: Any, batch: Mapping[str, torch.Tensor], end_ids: Sequence[int], *, max_tokens: int, temperature: float
) -> dict[str, torch.Tensor]:
    """The batch with the student's own answers behind its prompts, and labels on these; its random state decides."""
    prompts = [_prompt(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :] = prompt.to(device)
        mask[row, longest - len(prompt) :] = 1
    was_training = model.training
    model.eval()
    with torch.no_grad():
        said = model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=end_ids[0] if end_ids else 0,
            use_cache=True,
        )
    model.train(was_training)
    items = []
    for prompt, tokens in zip(prompts, said[:, longest:].tolist(), strict=True):
        stop = next((place + 1 for place, token in enumerate(tokens) if token in end_ids), len(tokens))
        ids = [*prompt.tolist(), *tokens[:stop]]
        items.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + tokens[:stop], "row": -1})
    return {key: value.to(batch["input_ids"].device) for key, value in collate(items).items()}


def _prompt(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What stands before the first learnt token; at least one token."""
    learnt = torch.nonzero(labels != IGNORED)
    return ids[: max(1, int(learnt[0]) if len(learnt) else len(ids))]


def batch_items(rows: Sequence[Tokenized]) -> list[dict[str, Any]]:
    return [
        {"input_ids": list(row.input_ids), "labels": list(row.labels), "row": number} for number, row in enumerate(rows)
    ]


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one `Batch`, padded on the right with what is neither seen nor learnt."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        ids[row, :length] = torch.tensor(item["input_ids"])
        labels[row, :length] = torch.tensor(item["labels"])
        mask[row, :length] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "row": torch.tensor([item["row"] for item in items]),
    }
