"""Axolotl and Unsloth: what each needs in the working folder, and the command that runs it.

In: a request and the prepared data. Out: a `TrainerJob`: the base as a Hugging Face folder (both train nothing else),
Axolotl's YAML or Unsloth's script with its settings. Both are told to train a plain 16-bit LoRA, not QLoRA: the adapter
is to fit the base that Ollama runs. Axolotl's keys: https://docs.axolotl.ai/docs/config-reference.html
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from ollama_forge.convert.to_hf import plan_hf_folder, write_hf_folder
from ollama_forge.dataset.prepare import PreparedFile
from ollama_forge.errors import ExistsError
from ollama_forge.files import write_bytes
from ollama_forge.jobs import unsloth_script
from ollama_forge.jobs.external_program import find_program
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.trainer_job import BASE_FOLDER, TrainerJob
from ollama_forge.train.options import LoopOptions, plan_steps, settle
from ollama_forge.transform.folder import atomic_folder
from ollama_forge.weights.checkpoint import open_checkpoint

AXOLOTL_FILE = "axolotl.yaml"
UNSLOTH_FILES = ("train_unsloth.py", "unsloth.json")


def plan_axolotl(
    request: FinetuneRequest, prepared: PreparedFile, base: ResolvedModel, result: Path, options: LandOptions
) -> TrainerJob:
    """Write Axolotl's config (and the base); the command is `axolotl train CONFIG`.

    Raises:
        ExistsError: an adapter is there already.
    """
    import yaml

    _require_free(result, request, options)
    folder = hf_base(request, base, options)
    settings = axolotl_settings(request, prepared, folder, result)
    config = request.folder / AXOLOTL_FILE
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=False)
    write_bytes(config, text.encode(), overwrite=True)
    program = find_program("axolotl")
    files = _written(request, prepared, config, folder)
    return TrainerJob("axolotl", (str(program or "axolotl"), "train", str(config)), program, prepared, files, result)


def plan_unsloth(
    request: FinetuneRequest, prepared: PreparedFile, base: ResolvedModel, result: Path, options: LandOptions
) -> TrainerJob:
    """Write a script that needs only Unsloth, and its settings beside it (and the base); this Python runs it.

    Raises:
        ExistsError: an adapter is there already.
    """
    _require_free(result, request, options)
    folder = hf_base(request, base, options)
    script, config = (request.folder / name for name in UNSLOTH_FILES)
    write_bytes(script, Path(unsloth_script.__file__).read_bytes(), overwrite=True)
    settings = unsloth_settings(request, prepared, folder, result)
    write_bytes(config, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(), overwrite=True)
    is_here = importlib.util.find_spec("unsloth") is not None
    python = sys.executable if is_here else "python"
    files = _written(request, prepared, script, config, folder)
    return TrainerJob(
        "unsloth",
        (python, str(script), str(config)),
        Path(python) if is_here else None,
        prepared,
        files,
        result,
    )


def axolotl_settings(request: FinetuneRequest, prepared: PreparedFile, base: Path, result: Path) -> dict[str, Any]:
    """The keys of Axolotl's YAML, in the order in which a person reads them."""
    loop = settle(request.loop, prepared.n_samples)
    settings: dict[str, Any] = {
        "base_model": str(base),
        "trust_remote_code": False,
        "load_in_8bit": False,
        "load_in_4bit": False,
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": str(prepared.path),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
                "roles_to_train": ["assistant"] if request.learn == "assistant" else ["system", "user", "assistant"],
                "train_on_eos": "turn",
            }
        ],
        "dataset_prepared_path": str(request.folder / "axolotl-prepared"),
        "val_set_size": request.validation_share,
        "output_dir": str(result),
        "adapter": "lora",
        "lora_r": request.lora.rank,
        "lora_alpha": _whole(request.lora.scaled_alpha),
        "lora_dropout": request.lora.dropout,
        **_axolotl_targets(request),
        "sequence_len": request.max_length,
        "sample_packing": False,
        "micro_batch_size": loop.batch_size,
        "gradient_accumulation_steps": loop.grad_accum,
        "num_epochs": loop.epochs,
        "optimizer": "adamw_torch",
        "lr_scheduler": loop.scheduler,
        "learning_rate": loop.learning_rate,
        **({"warmup_ratio": loop.warmup} if loop.warmup < 1 else {"warmup_steps": int(loop.warmup)}),
        "weight_decay": loop.weight_decay,
        "bf16": "auto",
        "tf32": False,
        "gradient_checkpointing": loop.checkpointing,
        "logging_steps": 1,
        "seed": loop.seed,
    }
    if loop.max_steps:
        settings["max_steps"] = loop.max_steps
    if loop.checkpoint_every:
        settings["save_steps"] = loop.checkpoint_every
    if loop.early_stop and request.validation_share:
        settings["early_stopping_patience"] = loop.early_stop
    if request.resume:
        settings["auto_resume_from_checkpoints"] = True
    padding = _padding_token(base)
    return {**settings, "special_tokens": {"pad_token": padding}} if padding else settings


def unsloth_settings(request: FinetuneRequest, prepared: PreparedFile, base: Path, result: Path) -> dict[str, Any]:
    """What the script reads."""
    loop = settle(request.loop, prepared.n_samples)
    return {
        "base": str(base),
        "data": str(prepared.path),
        "output": str(result),
        "checkpoints": str(request.folder / "unsloth-checkpoints"),
        "max_length": request.max_length,
        "learn": request.learn,
        "rank": request.lora.rank,
        "alpha": _whole(request.lora.scaled_alpha),
        "dropout": request.lora.dropout,
        "target_modules": list(request.lora.target_modules),
        "resume": request.resume,
        "checkpointing": loop.checkpointing,
        "loop": _trainer_arguments(loop, prepared.n_samples),
    }


def hf_base(request: FinetuneRequest, base: ResolvedModel, options: LandOptions) -> Path:
    """The base as a Hugging Face folder: itself, or one that is written once into the working folder.

    Raises:
        UnsupportedError: a family that cannot be written so.
    """
    if base.folder is not None:
        return base.folder.absolute()
    assert base.gguf_path is not None
    folder = request.folder / BASE_FOLDER
    if folder.exists():
        return folder
    with open_checkpoint(base.gguf_path) as checkpoint:
        plan = plan_hf_folder(checkpoint)
        with (
            atomic_folder(folder, expected_bytes=plan.size_bytes) as temp,
            options.progress(f"Writing {folder.name}", plan.size_bytes) as advance,
        ):
            write_hf_folder(plan, temp, advance)
    return folder


def _trainer_arguments(loop: LoopOptions, n_samples: int) -> dict[str, Any]:
    """By the names of transformers' TrainingArguments; warmup as steps, because not all versions take a share."""
    share = loop.warmup * plan_steps(n_samples, loop) if loop.warmup < 1 else loop.warmup
    return {
        "num_train_epochs": loop.epochs,
        "max_steps": loop.max_steps or -1,
        "learning_rate": loop.learning_rate,
        "per_device_train_batch_size": loop.batch_size,
        "gradient_accumulation_steps": loop.grad_accum,
        "warmup_steps": math.ceil(share),
        "lr_scheduler_type": loop.scheduler,
        "weight_decay": loop.weight_decay,
        "seed": loop.seed,
        "logging_steps": 1,
        "save_steps": loop.checkpoint_every or 500,
        "save_total_limit": 2,
    }


def _whole(number: float) -> int | float:
    """Both programs take alpha as an integer where it is one."""
    return int(number) if number.is_integer() else number


def _axolotl_targets(request: FinetuneRequest) -> dict[str, Any]:
    if request.lora.target_modules:
        return {"lora_target_modules": list(request.lora.target_modules)}
    return {"lora_target_linear": True}


def _padding_token(base: Path) -> str:
    """The token to pad with where the tokenizer names none: the end token, as padding has no loss."""
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(config, dict) or config.get("pad_token"):
        return ""
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _require_free(result: Path, request: FinetuneRequest, options: LandOptions) -> None:
    if result.exists() and not (options.overwrite or request.resume):
        raise ExistsError(
            f"There is an adapter already: {str(result)!r}",
            why="It may have taken hours to train.",
            next="Add --force to replace it, or choose another --adapter-output or --workdir.",
        )


def _written(request: FinetuneRequest, prepared: PreparedFile, *others: Path) -> tuple[Path, ...]:
    inside = [path for path in others if path.is_relative_to(request.folder)]
    return (prepared.path, *inside)
