"""Train a student to predict what its teacher predicts; the loop, checkpoints and seeds are those of `finetune`.

In: a packed student, somebody to ask (`teacher.Teacher`), tokenized rows, options. Out: a PEFT folder, or with full
training a GGUF, and what happened, in numbers. TRL's own distillation trainer computes its loss from the two models'
head matrices as plain tensors; here both may be packed, so the loss is `distill_loss` inside transformers' trainer.
"""

from __future__ import annotations

import functools
import math
import os
import random
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import ModelOutput

from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.errors import TrainingError
from ollama_forge.train.distill_batches import IGNORED, answer_itself, batch_items, collate
from ollama_forge.train.distill_loss import Targets, distill_scores
from ollama_forge.train.distill_options import DistillLoss, DistillOptions, TrainedStudent
from ollama_forge.train.finetune import add_adapter, require_finite, require_labels
from ollama_forge.train.full import plan_write_back, unpack_weights, write_back
from ollama_forge.train.load import PackedModel
from ollama_forge.train.loop import (
    GracefulInterrupt,
    Recorder,
    checkpoints_kept,
    find_checkpoint,
    interrupted,
    loop_settings,
    run_numbers,
)
from ollama_forge.train.loss import Head, install_chunked_loss, scales_logits
from ollama_forge.train.options import (
    ACTIVATION_ROOM_BYTES,
    LoopOptions,
    LoraOptions,
    Watch,
    plan_steps,
    settle,
)
from ollama_forge.train.recompute import recompute_activations
from ollama_forge.train.shared_blocks import sharing_blocks
from ollama_forge.train.teacher import Batch, Teacher, wanted_positions
from ollama_forge.weights.adapter import RESULT_FOLDER

STUDENT_FILE = "student.gguf"
_JUDGED_ROWS = 32


@dataclass(frozen=True)
class StudentRows:
    """Token rows. `validation` may be empty; rows are numbered through both, training first."""

    train: Sequence[Tokenized]
    validation: Sequence[Tokenized] = ()

    @property
    def all(self) -> list[Tokenized]:
        return [*self.train, *self.validation]


def distil_student(
    student: PackedModel,
    teacher: Teacher,
    rows: StudentRows,
    lora: LoraOptions,
    loop: LoopOptions,
    options: DistillOptions,
    folder: Path,
    *,
    base: str,
    end_ids: Sequence[int] = (),
    resume: bool = False,
    is_shared: bool = False,
    watch: Watch | None = None,
) -> TrainedStudent:
    """Train, and prove that it did something.

    Args:
        folder: for checkpoints and the result.
        base: what the adapter's config will name as its base.
        end_ids: tokens that end an answer, for the student's own ones.
        resume: go on from the last complete checkpoint in `folder`.
        is_shared: the packed layers are shared out over the processes (`train.shared_blocks`).

    Raises:
        TrainingError: the weights of student or teacher are not finite, nothing was learnt, the loss is not a number,
            or there is nothing to train on.
        UnsupportedError: full training of a file whose types cannot be written again.
        InterruptedRunError: Ctrl-C; a checkpoint was written.
        DiskError: the disk is full; the last complete checkpoint is there.
    """
    started = time.monotonic()
    require_labels(rows.train)
    loop = settle(loop, len(rows.train))
    set_seed(loop.seed)
    trained = _trainable(student, lora, options)
    install_distill_loss(student.model, options.loss)
    if loop.checkpointing:
        recompute_activations(student.model, 0 if is_shared else ACTIVATION_ROOM_BYTES)
    total_steps = plan_steps(len(rows.train), loop, int(os.environ.get("WORLD_SIZE", 1)))
    recorder = Recorder(watch, sum(len(row.input_ids) for row in rows.train) * loop.epochs)
    settings = TrainingArguments(**loop_settings(loop, folder, total_steps, has_validation=bool(rows.validation)))
    stop_early = [EarlyStoppingCallback(loop.early_stop)] if loop.early_stop and rows.validation else []
    with sharing_blocks([student.model, *teacher.modules()] if is_shared else [], settings.device):
        trainer = DistillTrainer(trained, settings, rows, teacher, options, end_ids, [recorder, *stop_early])
        numbered = list(enumerate(rows.all))
        judged = (numbered[len(rows.train) :] or numbered)[:_JUDGED_ROWS]
        before = judge(trained, teacher, judged)
        require_finite(before.cross_entropy, f"the student {base!r}")
        require_finite(before.divergence, "the teacher")
        checkpoint = find_checkpoint(folder) if resume else None
        with checkpoints_kept(folder), GracefulInterrupt(recorder):
            trainer.run(checkpoint, total_steps)
        if recorder.is_interrupted:
            raise interrupted(trainer.state.global_step, total_steps, folder)
        after = judge(trained, teacher, judged)
    warnings = _prove_learning(trained, before, after, options)
    if trainer.is_world_process_zero():
        with checkpoints_kept(folder):
            _write_result(student, trained, folder, base, options)
    return TrainedStudent(
        adapter=None if options.is_full else folder / RESULT_FOLDER,
        model=folder / STUDENT_FILE if options.is_full else None,
        base_divergence=before.divergence,
        final_divergence=after.divergence,
        base_loss=before.cross_entropy,
        final_loss=after.cross_entropy,
        warnings=warnings,
        **run_numbers(trainer, trained, recorder.n_tokens, started),
    )


def _trainable(student: PackedModel, lora: LoraOptions, options: DistillOptions) -> PreTrainedModel:
    if options.is_full:
        plan_write_back(student)
        unpack_weights(student)
        return student.model.train()
    adapted: Any = add_adapter(student.model, lora)
    return adapted


def _write_result(student: PackedModel, trained: Any, folder: Path, base: str, options: DistillOptions) -> None:
    if options.is_full:
        write_back(student, folder / STUDENT_FILE)
        return
    # Named only now: with a name, peft would look for the base on the Hub at every checkpoint.
    trained.peft_config["default"].base_model_name_or_path = base
    trained.save_pretrained(str(folder / RESULT_FOLDER), safe_serialization=True, save_embedding_layers=False)


@dataclass
class DistillOutput(ModelOutput):
    """What the student returns when it is given its teacher's predictions."""

    loss: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None


def install_distill_loss(model: PreTrainedModel, loss: DistillLoss) -> None:
    """Make `model(..., labels=..., teacher_targets=...)` return a `DistillOutput`; other calls are as before.

    The loss lies inside the model's own forward, where data-parallel wrappers can see it.
    """
    install_chunked_loss(model)
    plain_forward = model.forward

    @functools.wraps(plain_forward)
    def forward(self: PreTrainedModel, *args: Any, teacher_targets: Targets | None = None, **kwargs: Any) -> Any:
        if teacher_targets is None:
            return plain_forward(*args, **kwargs)
        return _compare_batch(self, teacher_targets, loss, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def student_head(model: PreTrainedModel) -> Head | None:
    """The head, frozen or learning, where it is a plain linear layer without a scale of its own."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or scales_logits(model.config):
        return None
    return Head(layer, getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0)


def _compare_batch(
    model: PreTrainedModel,
    targets: Targets,
    loss: DistillLoss,
    *args: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> DistillOutput:
    head = student_head(model)
    assert head is not None
    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    wanted = labels[:, 1:].to(hidden.device)
    mask = wanted != IGNORED
    scores = distill_scores(hidden[mask], wanted[mask], targets, head, loss)
    n_items: Any = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return DistillOutput(scores.loss / n_items, scores.divergence / n_items, scores.cross_entropy / n_items)


class DistillTrainer(Trainer):
    """transformers' trainer, asking the teacher before each pass; some batches are the student's own answers."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        rows: StudentRows,
        teacher: Teacher,
        options: DistillOptions,
        end_ids: Sequence[int],
        callbacks: list[Any],
    ) -> None:
        items = batch_items(rows.all)
        super().__init__(
            model=model,
            args=args,
            train_dataset=items[: len(rows.train)],
            eval_dataset=items[len(rows.train) :] or None,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self._teacher = teacher
        self._options = options
        self._end_ids = list(end_ids)
        teacher.to(args.device)

    def run(self, checkpoint: Path | None, total_steps: int) -> None:
        """Train to the end; from a checkpoint that is the end already, only its weights are taken."""
        if checkpoint is not None and int(checkpoint.name.rsplit("-", 1)[-1]) >= total_steps:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next batches, some of them answered by the student, and how many labels they have together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._perhaps_own(batch, place) for place, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mixed loss of one batch."""
        with self.accelerator.autocast():
            targets = self._teacher.targets(inputs)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            teacher_targets=targets,
            num_items_in_batch=num_items_in_batch,
        )
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _perhaps_own(self, batch: dict[str, torch.Tensor], place: int) -> dict[str, torch.Tensor]:
        own = self._options.on_policy
        key = f"{self.args.seed}:{self.state.global_step}:{place}:{self.accelerator.process_index}"
        draw = random.Random(key)
        if draw.random() >= own.share:
            return batch
        model: Any = self.accelerator.unwrap_model(self.model)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(draw.getrandbits(63))
            return answer_itself(model, batch, self._end_ids, max_tokens=own.max_tokens, temperature=own.temperature)


@dataclass(frozen=True)
class Judgement:
    """Means over labels, nats: from the teacher, and with the data's answers."""

    divergence: float
    cross_entropy: float


@torch.no_grad()
def judge(model: Any, teacher: Teacher, numbered: Sequence[tuple[int, Tokenized]]) -> Judgement:
    """How far the student is from its teacher on some rows, each with its number in the whole data."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    divergence = cross_entropy = 0.0
    n_labels = 0
    for number, row in numbered:
        item = {"input_ids": list(row.input_ids), "labels": list(row.labels), "row": number}
        batch: Batch = {key: value.to(device) for key, value in collate([item]).items()}
        count = int(wanted_positions(batch).sum())
        if not count:
            continue
        targets = teacher.targets(batch)
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            teacher_targets=targets,
        )
        divergence += float(output.divergence) * count
        cross_entropy += float(output.cross_entropy) * count
        n_labels += count
    model.train(was_training)
    return Judgement(divergence / n_labels, cross_entropy / n_labels) if n_labels else Judgement(math.nan, math.nan)


def _prove_learning(model: nn.Module, before: Judgement, after: Judgement, options: DistillOptions) -> tuple[str, ...]:
    measured = [after.divergence, after.cross_entropy]
    moved = [float(p.detach().float().square().sum()) for name, p in model.named_parameters() if "lora_B" in name]
    if not all(map(math.isfinite, [*measured, *moved])):
        raise TrainingError(
            f"Distillation diverged: {after.divergence} nats from the teacher",
            why="The weights hold numbers that are not finite.",
            next="Use a lower --lr (for example 1e-4), or check the data for broken lines.",
        )
    if before == after or (not options.is_full and sum(moved) == 0.0):
        raise TrainingError(
            "Distillation changed nothing: the student predicts what it predicted before",
            why="No optimizer step had an effect, or the student is its teacher already.",
            next="Raise --lr or --epochs, and check the mask: ollama-forge train-data stats DATA --base REF",
        )
    if after.divergence >= before.divergence and not options.loss.ce_weight:
        return (
            f"The student did not come nearer to its teacher: {before.divergence:.4f} nats before, "
            f"{after.divergence:.4f} after.",
        )
    return ()
