"""Ablations tried on a loaded model: switched on and off as projections of what its layers give, no weight rewritten.

In: a packed model, prompts as token ids, and `Projection`s that `transform.ablation` has planned. Out: what the model
then says, and how far its harmless answers lie from its own untouched ones. (I - s B^T B)(W x + b) is what the edited
weights would give, so a trial costs two thin products for each layer, and the logits are those of the written edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ollama_forge.arch.rows import Role
from ollama_forge.errors import TrainingError
from ollama_forge.measure.answer_shift import answer_windows, find_surprises, first_places
from ollama_forge.train.load import PackedModel
from ollama_forge.train.scoring import Reference, capture_reference, compare, score, vocabulary_size
from ollama_forge.transform.projection import Projection

BATCH_ROWS = 32
"""Prompts that are answered together: each layer is dequantized once for all of them."""


@dataclass(frozen=True)
class TrialAnswers:
    """What a model with one ablation says and is.

    Attributes:
        answers: token ids of the answers to the prompts that it should no longer refuse, the end token included.
        surprises: how unlikely the untouched model finds each of them, see `answer_shift.find_surprises`.
        first_kl, answer_kl: mean KL(untouched || ablated) in nats at the first token of the harmless answers, and over
            all their tokens.
    """

    answers: tuple[tuple[int, ...], ...]
    surprises: tuple[float | None, ...]
    first_kl: float
    answer_kl: float


class TrialModel:
    """A model on which ablations are tried, and what it said and was before any.

    Args:
        packed: gets hooks for the time of a trial; otherwise it stays as it is.
        harmful, harmless: prompts as token ids.
        end_ids: tokens that end an answer.
        max_tokens: of an answer.

    Attributes:
        harmful_answers, harmless_answers: of the untouched model.
    """

    def __init__(
        self,
        packed: PackedModel,
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        end_ids: frozenset[int],
        max_tokens: int,
    ) -> None:
        self._packed = packed
        self._harmful = harmful
        self._end_ids = end_ids
        self._max_tokens = max_tokens
        self.harmful_answers = self._answer(harmful)
        self.harmless_answers = self._answer(harmless)
        self._pairs = list(zip(harmless, self.harmless_answers, strict=True))
        self._reference: Reference = capture_reference(packed, answer_windows(self._pairs))

    def measure(self, projections: Sequence[Projection]) -> TrialAnswers:
        """Switch an ablation on, ask, compare, and switch it off."""
        with projected(self._packed, projections):
            answers = self._answer(self._harmful)
            found = compare(self._packed, self._reference, self._reference.windows, n_worst=0)
        first = found.kl_values[first_places(self._pairs)]
        surprises = find_surprises(
            partial(score, self._packed), list(zip(self._harmful, answers, strict=True)), vocabulary_size(self._packed)
        )
        return TrialAnswers(answers, tuple(surprises), float(first.mean()), found.kl.mean)

    def _answer(self, prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        return generate_greedily(self._packed, prompts, self._end_ids, self._max_tokens)


@contextlib.contextmanager
def projected(packed: PackedModel, projections: Sequence[Projection]) -> Iterator[None]:
    """Inside the block the model answers as one whose weights were edited so.

    Raises:
        TrainingError: a tensor that is to be edited belongs to no layer of the loaded model.
    """
    with contextlib.ExitStack() as undo:
        for item in projections:
            if item.tensor.row.is_bias:
                continue  # its matrix is projected with it
            path = item.tensor.hf_name.rpartition(".")[0]
            try:
                layer = packed.model.get_submodule(path)
            except AttributeError as exc:
                raise TrainingError(
                    f"{item.tensor.gguf_name!r} belongs to {path!r}, which the loaded model does not have",
                    next="Report the model; `abliterate apply` edits its weights without loading it.",
                ) from exc
            project = _projection(item, packed)
            undo.callback(layer.register_forward_hook(_on_output(project)).remove)
            if item.tensor.row.role is Role.TOKEN_EMBEDDING and _is_tied(packed):
                # (E - s E B^T B) h = E (h - s B^T B h): the head reads the same rows.
                undo.callback(packed.model.base_model.register_forward_hook(_on_last_state(project)).remove)
        yield


def _is_tied(packed: PackedModel) -> bool:
    names = [row.gguf_name for row in packed.family.rows_with_role(Role.OUTPUT)]
    return not any(name in packed.file.tensors for name in names)


Project = Callable[[torch.Tensor], torch.Tensor]


def _projection(item: Projection, packed: PackedModel) -> Project:
    device = next(packed.model.parameters()).device
    basis = torch.from_numpy(item.basis).to(device)
    strength = item.strength

    def project(y: torch.Tensor) -> torch.Tensor:
        wide = y.float()
        return (wide - strength * ((wide @ basis.t()) @ basis)).to(y.dtype)

    return project


def _on_output(project: Project) -> Callable[..., Any]:
    def hook(_layer: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return project(output)

    return hook


def _on_last_state(project: Project) -> Callable[..., Any]:
    def hook(_model: nn.Module, _inputs: tuple[Any, ...], outputs: Any) -> Any:
        outputs.last_hidden_state = project(outputs.last_hidden_state)
        return outputs

    return hook


@torch.no_grad()
def generate_greedily(
    packed: PackedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int], max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """The likeliest continuation of each prompt, at most `max_tokens` tokens, the end token included.

    Prompts of like length are answered together; the answers stand in the order of the prompts.
    """
    model: Any = packed.model
    device = next(packed.model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: list[tuple[int, ...]] = [()] * len(prompts)
    pad = min(end_ids, default=0)
    for start in range(0, len(order), BATCH_ROWS):
        batch = order[start : start + BATCH_ROWS]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            prompt = prompts[index]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(end_ids) or None,
            pad_token_id=pad,
            use_cache=True,
        )
        for row, index in enumerate(batch):
            said[index] = _until_end(found[row, width:].tolist(), end_ids)
    return tuple(said)


def _until_end(ids: Sequence[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    for place, token_id in enumerate(ids):
        if token_id in end_ids:
            return tuple(ids[: place + 1])
    return tuple(ids)
