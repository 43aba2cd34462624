"""What every training loop here shares: its settings, checkpoints that are marked when complete, and Ctrl-C.

In: `LoopOptions`. Out: arguments for transformers' `Trainer` and TRL's, a callback that reports, and the last
checkpoint that was written to its end. What is learnt, and from what, is `finetune`'s and `distill`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback

from ollama_forge.errors import DiskError, InterruptedRunError
from ollama_forge.files import disk_error, write_bytes
from ollama_forge.train.device import require_device
from ollama_forge.train.options import (
    KEPT_CHECKPOINTS,
    LoopOptions,
    LossPoint,
    StepReport,
    Watch,
    checkpoint_interval,
)

COMPLETE_MARK = "complete.json"


def find_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_MARK}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[-1]), default=None)


@contextlib.contextmanager
def checkpoints_kept(folder: Path) -> Iterator[None]:
    """Around all that a run writes: a disk that is full ends it in words, and the last complete checkpoint stays.

    What was begun and not completed is removed, so that its room is there for the next try.

    Raises:
        DiskError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as exc:
        if not _is_full_disk(exc):
            raise
        _remove_begun(folder)
        raise _full_disk(folder) from exc
    except DiskError as exc:
        if not isinstance(exc.__cause__, OSError) or not _is_full_disk(exc.__cause__):
            raise
        _remove_begun(folder)
        raise _full_disk(folder) from exc


def _is_full_disk(error: Exception) -> bool:
    """Whether a writer met a full disk: the system's own error, safetensors' text of it, or that torch's archive came
    out shorter than what was written into it (it drops the number of the error)."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    marks = ("os error 28", "os error 122", "PytorchStreamWriter", "inline_container.cc")
    return any(mark in str(error) for mark in marks)


def _full_disk(folder: Path) -> DiskError:
    checkpoint = find_checkpoint(folder)
    error = disk_error(OSError(errno.ENOSPC, ""), folder, "go on writing in")
    error.why = f"The last complete checkpoint is {str(checkpoint)!r}." if checkpoint else "No checkpoint is complete."
    error.next = "Free some space, then run the same command again with --resume."
    return error


def _remove_begun(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE_MARK).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


def interrupted(step: int, total_steps: int, folder: Path) -> InterruptedRunError:
    """The error that ends an interrupted run."""
    return InterruptedRunError(
        f"Training was interrupted after step {step} of {total_steps}",
        why=f"A checkpoint is in {str(folder)!r}.",
        next="Run the same command again with --resume to go on.",
    )


def loop_settings(loop: LoopOptions, folder: Path, total_steps: int, *, has_validation: bool) -> dict[str, Any]:
    """Arguments for a `TrainingArguments` of transformers or TRL.

    Raises:
        UsageError: CUDA was asked for and is not here.
    """
    require_device(loop.device)
    every = checkpoint_interval(loop, total_steps)
    use_cuda = torch.cuda.is_available() and loop.device != "cpu"
    return {
        "output_dir": str(folder),
        "num_train_epochs": loop.epochs,
        "max_steps": total_steps,
        "learning_rate": loop.learning_rate,
        "per_device_train_batch_size": loop.batch_size,
        "per_device_eval_batch_size": loop.batch_size,
        "gradient_accumulation_steps": loop.grad_accum,
        "warmup_steps": int(loop.warmup * total_steps if loop.warmup < 1 else loop.warmup),
        "lr_scheduler_type": loop.scheduler,
        "weight_decay": loop.weight_decay,
        "seed": loop.seed,
        "data_seed": loop.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": KEPT_CHECKPOINTS,
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": every,
        "eval_on_start": has_validation,
        "load_best_model_at_end": bool(loop.early_stop and has_validation),
        "metric_for_best_model": "eval_loss" if has_validation else None,
        "gradient_checkpointing": False,  # `train.recompute` has switched it on, in a way of its own
        "use_cpu": not use_cuda,
        "bf16": use_cuda and torch.cuda.is_bf16_supported(),
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": list(loop.report_to) or "none",
        "run_name": folder.name,
        "dataloader_pin_memory": use_cuda,
        "remove_unused_columns": False,
    }


def run_numbers(trainer: Any, model: nn.Module, n_tokens: int, started: float) -> dict[str, Any]:
    """What every trained thing says of its run (`TrainedAdapter`, `TrainedStudent`).

    Args:
        trainer: transformers', ended.
        started: `time.monotonic()` before the work began.
    """
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "train_losses": tuple(LossPoint(int(row["step"]), row["loss"]) for row in history if "loss" in row),
        "validation_losses": tuple(
            LossPoint(int(row["step"]), row["eval_loss"]) for row in history if "eval_loss" in row
        ),
        "n_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "n_tokens": n_tokens,
        "seconds": time.monotonic() - started,
    }


@dataclass
class Recorder(TrainerCallback):
    """Tells where the run stands, marks complete checkpoints, and ends the run at a step's end after Ctrl-C."""

    watch: Watch | None
    n_planned_tokens: float
    is_interrupted: bool = False
    n_tokens: int = 0
    _started: float = field(default_factory=time.monotonic)
    _first_step: int | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a step was begun."""
        return self._first_step is not None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._first_step is None:
            self._first_step = state.global_step
            self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = state.global_step - (self._first_step or 0)
        share = state.global_step / max(1, state.max_steps)
        self.n_tokens = int(self.n_planned_tokens * share)
        if self.watch:
            self.watch(
                StepReport(
                    state.global_step,
                    state.max_steps,
                    float(logs["loss"]),
                    self.n_planned_tokens * done / max(1, state.max_steps) / seconds,
                    seconds / max(1, done) * (state.max_steps - state.global_step),
                )
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            write_bytes(checkpoint / COMPLETE_MARK, json.dumps({"step": state.global_step}).encode(), overwrite=True)


class GracefulInterrupt:
    """The first Ctrl-C ends the run after the step under way, with a checkpoint; the second ends it at once.

    Before the first step there is nothing to keep, and the first one ends it at once too. Where the signal is ignored,
    as in a script's background, it stays ignored.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._previous: Any = None

    def __enter__(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: whoever runs us handles it
            self._previous = None

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: Any) -> None:
        is_at_once = self._recorder.is_interrupted or not self._recorder.has_begun
        self._recorder.is_interrupted = True
        if is_at_once:
            raise KeyboardInterrupt
