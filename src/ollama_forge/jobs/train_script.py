"""A bash script that does a whole fine-tune, step by step, for somebody who wants to read it, keep it or change it.

In: what was asked, as words. Out: the script's text. Every value is quoted for the shell and stands in a variable at
the top; what names say in comments cannot leave its line. Nothing here is run.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.jobs.finetune import TEMPLATE_FILE
from ollama_forge.jobs.trainer_llama_cpp import LORA_NAME, SAMPLE_START


@dataclass(frozen=True)
class ScriptRequest:
    """What the script is to do.

    Attributes:
        name: the Ollama model to make; None: only train.
        base_gguf: what is trained on, where it is not the base.
        prepared: the data in the trainer's form; `format` says which.
        adapter_dir: where llama.cpp's finetune puts its adapter.
        workdir: where the other trainers work.
        trainer: `builtin`, `llama.cpp`, `axolotl` or `unsloth`.
        include: patterns for folders of data.
        train_words: more options for training, as typed.
        finetune_words: more options for llama.cpp's finetune, in its own words.
        retrain_words: more options for landing, as typed.
    """

    data: tuple[Path, ...]
    base: str
    name: str | None
    base_gguf: Path | None
    prepared: Path
    format: str
    adapter_dir: Path
    workdir: Path
    trainer: str
    include: tuple[str, ...] = ()
    train_words: tuple[str, ...] = ()
    finetune_words: tuple[str, ...] = ()
    retrain_words: tuple[str, ...] = ()

    @property
    def adapter(self) -> Path:
        """Where the adapter will be."""
        return self.adapter_dir / LORA_NAME if self.trainer == "llama.cpp" else self.workdir / "adapter"


def render_script(request: ScriptRequest) -> str:
    """The script's text; the same request gives the same text."""
    n_steps = 4 if request.name is not None else 3
    lines = [
        "#!/usr/bin/env bash",
        "# Fine-tune a model and land it in Ollama. Written by: ollama-forge train --write-script",
        "#",
        f"# Data:    {_remark(' '.join(map(str, request.data)))}",
        f"# Base:    {_remark(request.base)}",
        f"# Name:    {_remark(request.name or '(none: the adapter is kept, nothing is landed)')}",
        f"# Adapter: {_remark(str(request.adapter))}",
        f"# Trainer: {_remark(request.trainer)}",
        "#",
        "# Relative paths start from the folder in which the script is run. It stops at the first step that fails;",
        "# run it again to go on.",
        "",
        "set -euo pipefail",
        "",
        f"DATA=({_words(request.data)})",
        _variable("BASE", request.base),
        *([_variable("NAME", request.name)] if request.name is not None else []),
        "# A GGUF of the base to train on; empty: the base itself.",
        _variable("BASE_GGUF", str(request.base_gguf or "")),
        _variable("PREPARED", str(request.prepared)),
        _variable("WORKDIR", str(request.workdir)),
        _variable("ADAPTER", str(request.adapter)) if request.trainer == "llama.cpp" else 'ADAPTER="$WORKDIR/adapter"',
        "",
        f"echo '[1/{n_steps}] Checking the data'",
        f'ollama-forge validate-training-data{_options("--include", request.include)} -- "${{DATA[@]}}"',
        "",
        f"echo '[2/{n_steps}] Writing the data in the form {request.format}'",
        f'ollama-forge prepare-training-data --format {shlex.quote(request.format)} -o "$PREPARED" --force'
        f'{_options("--include", request.include)} -- "${{DATA[@]}}"',
        "",
        f"echo '[3/{n_steps}] Training'",
        *(_external_step(request) if request.trainer == "llama.cpp" else _own_step(request)),
    ]
    if request.name is not None:
        lines += [
            "",
            f"echo '[4/{n_steps}] Landing the result in Ollama'",
            *_landing_step(request),
        ]
    return "\n".join(lines) + "\n"


def _external_step(request: ScriptRequest) -> list[str]:
    return [
        "if ! command -v finetune >/dev/null 2>&1; then",
        '  echo "llama.cpp\'s finetune is not on PATH; ollama-forge train-run trains without it" >&2',
        "  exit 1",
        "fi",
        'mkdir -p -- "$(dirname -- "$ADAPTER")"',
        f'finetune --train-data "$PREPARED" --sample-start {shlex.quote(SAMPLE_START)} --model-base "$BASE_GGUF" '
        '--lora-out "$ADAPTER"' + _tail(request.finetune_words),
    ]


def _own_step(request: ScriptRequest) -> list[str]:
    own_data = "" if request.trainer == "builtin" else ' --prepared-output "$PREPARED"'
    return [
        "DATA_OPTIONS=()",
        'for path in "${DATA[@]}"; do DATA_OPTIONS+=(--data "$path"); done',
        f'ollama-forge train-run "${{DATA_OPTIONS[@]}}"{_options("--include", request.include)} --base "$BASE" '
        '${BASE_GGUF:+--base-gguf "$BASE_GGUF"} \\',
        f'  --trainer {shlex.quote(request.trainer)} --workdir "$WORKDIR"{own_data} --skip-retrain --resume'
        + _tail(request.train_words),
    ]


def _landing_step(request: ScriptRequest) -> list[str]:
    landing = 'ollama-forge retrain --base "$BASE" --adapter "$ADAPTER" --name "$NAME"'
    if request.trainer != "builtin":
        return [landing + _tail(request.retrain_words)]
    return [
        "# To a base without a chat template Ollama must send what it was trained on; that template is left beside it.",
        f'TEMPLATE="$WORKDIR/{TEMPLATE_FILE}"',
        'if [ ! -e "$TEMPLATE" ]; then TEMPLATE=; fi',
        landing + ' ${TEMPLATE:+--template "@$TEMPLATE"}' + _tail(request.retrain_words),
    ]


def _variable(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value)}"


def _words(values: Sequence[object]) -> str:
    return " ".join(shlex.quote(str(value)) for value in values)


def _tail(words: Sequence[str]) -> str:
    return f" \\\n  {_words(words)}" if words else ""


def _options(flag: str, values: Sequence[str]) -> str:
    return "".join(f" {flag} {shlex.quote(value)}" for value in values)


def _remark(text: str) -> str:
    """Text that stays on its comment line: whatever does not print is spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
