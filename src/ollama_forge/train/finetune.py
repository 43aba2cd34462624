"""Train LoRA matrices on a frozen model: the matrices are peft's, the loop TRL's, the layers beneath may be packed.

In: a loaded model, tokenized examples, options. Out: a PEFT folder and what happened, in numbers. A run can be killed
at any moment: checkpoints are marked when they are complete, and `resume` goes on from the last such one. Training
that did nothing is an error here, not a finished run.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from ollama_forge.dataset.pack import pack_rows
from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.errors import TrainingError
from ollama_forge.train.loop import (
    GracefulInterrupt,
    Recorder,
    checkpoints_kept,
    find_checkpoint,
    interrupted,
    loop_settings,
    run_numbers,
)
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.options import (
    ACTIVATION_ROOM_BYTES,
    LoopOptions,
    LoraOptions,
    TrainedAdapter,
    Watch,
    plan_steps,
    settle,
)
from ollama_forge.train.recompute import recompute_activations
from ollama_forge.train.shared_blocks import sharing_blocks
from ollama_forge.train.targets import is_adapted, is_expert, require_targets
from ollama_forge.weights.adapter import RESULT_FOLDER

_BASE_LOSS_EXAMPLES = 32


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Tokenized],
    validation: Sequence[Tokenized],
    lora: LoraOptions,
    loop: LoopOptions,
    folder: Path,
    *,
    base: str,
    resume: bool = False,
    is_shared: bool = False,
    watch: Watch | None = None,
) -> tuple[PeftModel, TrainedAdapter]:
    """Train, and prove that it did something.

    Args:
        model: frozen; from `load.load_packed` or transformers.
        folder: for checkpoints and the result (`folder / "adapter"`).
        base: what the adapter's config will name as its base.
        resume: go on from the last complete checkpoint in `folder`.
        is_shared: the packed layers are shared out over the processes (`train.shared_blocks`).

    Raises:
        TrainingError: the base's weights are not finite, nothing was learnt, the loss is not a number, or there is
            nothing to train on.
        InterruptedRunError: Ctrl-C; a checkpoint was written.
        DiskError: the disk is full; the last complete checkpoint is there.
    """
    started = time.monotonic()
    require_labels(train)
    packs = pack_rows(train, loop.packed_length)
    loop = settle(loop, len(packs))
    set_seed(loop.seed)
    install_chunked_loss(model)
    judged = list(validation or train)[:_BASE_LOSS_EXAMPLES]
    adapted = add_adapter(model, lora)
    if loop.checkpointing:
        recompute_activations(model, 0 if is_shared else ACTIVATION_ROOM_BYTES)
    total_steps = plan_steps(len(packs), loop, int(os.environ.get("WORLD_SIZE", "1")))
    recorder = Recorder(watch, sum(len(row.input_ids) for row in train) * loop.epochs)
    settings = SFTConfig(
        **loop_settings(loop, folder, total_steps, has_validation=bool(validation)),
        max_length=None,
        packing=bool(loop.packed_length),  # rows come packed; this makes TRL keep the examples in them apart
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    stop_early = [EarlyStoppingCallback(loop.early_stop)] if loop.early_stop and validation else []
    with sharing_blocks([model] if is_shared else [], settings.device):
        trainer = _trainer(adapted, tokenizer, packs, validation, settings, [recorder, *stop_early])
        install_chunked_loss(model)
        base_loss = mean_loss(adapted, judged)  # B is zero still
        require_finite(base_loss, f"the base {base!r}")
        checkpoint = find_checkpoint(folder) if resume else None
        with checkpoints_kept(folder), GracefulInterrupt(recorder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if recorder.is_interrupted:
            raise interrupted(trainer.state.global_step, total_steps, folder)
        final_loss = mean_loss(adapted, judged)
    warnings = _prove_learning(adapted, base_loss, final_loss)
    result = folder / RESULT_FOLDER
    if trainer.is_world_process_zero():
        # Named only now: with a name, peft would look for the base on the Hub at every checkpoint.
        adapted.peft_config["default"].base_model_name_or_path = base
        with checkpoints_kept(folder):
            adapted.save_pretrained(str(result), safe_serialization=True, save_embedding_layers=False)
    return adapted, TrainedAdapter(
        folder=result,
        base_loss=base_loss,
        final_loss=final_loss,
        warnings=warnings,
        **run_numbers(trainer, adapted, recorder.n_tokens, started),
    )


def _trainer(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    packs: Sequence[Sequence[Tokenized]],
    validation: Sequence[Tokenized],
    settings: SFTConfig,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """TRL's, which says nothing: the recorder does."""
    trainer = SFTTrainer(
        model=adapted,
        args=settings,
        train_dataset=as_dataset(packs),
        eval_dataset=as_dataset(pack_rows(validation, 0)) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def add_adapter(model: PreTrainedModel, lora: LoraOptions) -> PeftModel:
    """Wrap a frozen model with trainable LoRA matrices.

    Raises:
        TrainingError: rank below 1, or a target that the model does not have.
    """
    if lora.rank < 1:
        raise TrainingError(f"A LoRA of rank {lora.rank} has nothing to train", next="Use --rank 8 or more.")
    linear = _linear_names(model)
    require_targets(linear, lora.target_modules)
    targets = list(lora.target_modules) or _default_targets(linear)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scaled_alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, use_packed_lora(config))
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = None
    return adapted


def _linear_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _default_targets(linear: Sequence[str]) -> list[str]:
    """Short names where they mean the same, for people who read the adapter's config."""
    targets = {name for name in linear if is_adapted(name, ())}
    return sorted(targets if any(map(is_expert, linear)) else {name.rpartition(".")[-1] for name in targets})


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Tokenized]) -> float:
    """Mean loss over the labels of some rows, nats per token."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    n_labels = 0
    for row in rows:
        labels = torch.tensor([row.labels], device=device)
        count = int((labels[:, 1:] != -100).sum())
        if count:
            loss = model(input_ids=torch.tensor([row.input_ids], device=device), labels=labels).loss
            total += float(loss) * count
            n_labels += count
    model.train(was_training)
    return total / n_labels if n_labels else math.nan


def require_labels(rows: Sequence[Tokenized]) -> None:
    if not any(label != -100 for row in rows for label in row.labels[1:]):
        raise TrainingError(
            f"None of the {len(rows)} examples has a token to learn",
            why="Every token is masked: the answers are empty, or cut off by --max-length.",
            next="Look at the mask: ollama-forge train-data stats DATA --base REF",
        )


def require_finite(loss: float, model: str) -> None:
    """Refuse a model that is broken before the first step.

    Raises:
        TrainingError: with the model.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss of {model} is {loss} before the first step",
            why="Its weights are not finite: NaN or infinite numbers are among them, or come of them.",
            next="Fetch or convert that model again, or choose another one: ollama-forge list",
        )


def _prove_learning(model: PeftModel, base_loss: float, final_loss: float) -> tuple[str, ...]:
    squares = [float(p.detach().float().square().sum()) for name, p in model.named_parameters() if "lora_B" in name]
    if not all(map(math.isfinite, [*squares, final_loss])):
        raise TrainingError(
            f"Training diverged: the loss is {final_loss}",
            why="The weights hold numbers that are not finite.",
            next="Use a lower --lr (for example 1e-4), or check the data for broken lines.",
        )
    if not squares or sum(squares) == 0.0:
        raise TrainingError(
            "Training changed nothing: every LoRA matrix is as it was at the start",
            why="No optimizer step had an effect.",
            next="Raise --lr or --epochs, and check the mask: ollama-forge train-data stats DATA --base REF",
        )
    if final_loss >= base_loss:
        return (f"The loss did not fall: {base_loss:.4f} before, {final_loss:.4f} after; nothing useful was learnt.",)
    return ()


def as_dataset(packs: Sequence[Sequence[Tokenized]]) -> Dataset:
    """A row for each pack; `seq_lengths` is what TRL's collator restarts positions by, and it masks first tokens."""
    return Dataset.from_dict(
        {
            "input_ids": [[token for row in pack for token in row.input_ids] for pack in packs],
            "labels": [[label for row in pack for label in row.labels] for pack in packs],
            "seq_lengths": [[len(row.input_ids) for row in pack] for pack in packs],
        }
    )
