"""A bash script that makes a model smaller, step by step, for somebody who wants to read it, keep it or change it.

In: a `PipelineRequest`, its plan, and what the result says beside its weights. Out: the script's text. Every value is
quoted for the shell, most of them in variables at the top; what names say in comments cannot leave its line. Nothing
here is run.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ollama_forge.jobs.downsizing_plan import PipelinePlan, PipelineRequest, PruneStep
from ollama_forge.store.modelfile import Modelfile, render_modelfile

_CONVERSION = (
    'if [ ! -e "$WORKDIR/original.gguf" ]; then ollama-forge convert "$MODEL" -o "$WORKDIR/original.gguf"; fi',
    'MODEL="$WORKDIR/original.gguf"',
)


def render_script(
    request: PipelineRequest,
    plan: PipelinePlan,
    modelfile: Modelfile,
    *,
    distill_words: Sequence[str] = (),
    landing_words: Sequence[str] = (),
    store_path: Path | None = None,
    is_folder: bool = False,
) -> str:
    """The script's text; the same request gives the same text.

    Args:
        modelfile: what is landed with the weights: what the model says itself, and what was asked for.
        distill_words: more options for healing, as typed.
        landing_words: more options for landing, as typed.
        is_folder: the model is a Hugging Face folder, which becomes a GGUF first.

    Raises:
        ModelfileError: the model says what no Modelfile can.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Make a model smaller: cut, heal, measure, quantize, land. Written by: ollama-forge downsize pipeline",
        "#",
        f"# Model:  {_remark(request.ref)} ({plan.n_layers} layers)",
        f"# Target: {_remark(request.goal.text)} ({plan.steps[-1].n_layers} layers, {plan.final_bytes:,} bytes)",
        "#",
        "# Relative paths start from the folder in which the script is run. It stops at the first step that fails;",
        "# run it again to go on.",
        "",
        "set -euo pipefail",
        "",
        f"MODEL={shlex.quote(request.ref)}",
        f"NAME={shlex.quote(request.name)}",
        *([f"export OLLAMA_MODELS={shlex.quote(str(store_path))}"] if store_path is not None else []),
        f"WORKDIR={shlex.quote(str(request.folder))}",
        f"DATA=({_words(request.data)})",
        "# A text or training data by which parts are ranked and models are judged; empty: a text of the tool.",
        f"TEXT={shlex.quote(str(request.text or ''))}",
        "",
        "DATA_OPTIONS=()",
        'for path in "${DATA[@]}"; do DATA_OPTIONS+=(--data "$path"); done',
        'mkdir -p -- "$WORKDIR"',
        *(_CONVERSION if is_folder else ()),
        'CURRENT="$MODEL"',
        "",
        "measure() {",
        '  case "$TEXT" in',
        '    "") ollama-forge measure "$1" --against "$MODEL" ;;',
        '    *.jsonl | *.json | *.csv | *.parquet) ollama-forge measure "$1" --against "$MODEL" --prompts "$TEXT" ;;',
        '    *) ollama-forge measure "$1" --against "$MODEL" --text "$TEXT" ;;',
        "  esac",
        "}",
    ]
    n_parts = 2 * len(plan.steps) + 2
    for step in plan.steps:
        lines += _step(step, request, n_parts, distill_words)
    lines += _end(request, plan, n_parts)
    lines += _landing(request, plan, n_parts, modelfile, landing_words)
    return "\n".join(lines) + "\n"


def _step(step: PruneStep, request: PipelineRequest, n_parts: int, words: Sequence[str]) -> list[str]:
    number = step.number
    return [
        "",
        f"echo '[{2 * number - 1}/{n_parts}] Cutting to {step.n_layers} layers'",
        f'PRUNED="$WORKDIR/step-{number}-pruned.gguf"',
        'if [ ! -e "$PRUNED" ]; then',
        f'  ollama-forge downsize prune "$CURRENT" --layers {step.n_layers} ${{TEXT:+--text "$TEXT"}} -o "$PRUNED"',
        "fi",
        'measure "$PRUNED"',
        "",
        f"echo '[{2 * number}/{n_parts}] Healing by distillation from the original'",
        f'HEALED="$WORKDIR/step-{number}-healed.gguf"',
        f'HEALING="$WORKDIR/heal-{number}"',
        'if [ ! -e "$HEALED" ]; then',
        "  RESUME=()",
        '  if [ -e "$HEALING/run.json" ]; then RESUME=(--resume); fi',
        '  ollama-forge downsize distill --teacher "$MODEL" --student "$PRUNED" "${DATA_OPTIONS[@]}"'
        f"{_options('--include', request.include)} \\",
        f'    --workdir "$HEALING" --skip-landing ${{RESUME[@]+"${{RESUME[@]}}"}}{_tail(words)}',
        *(
            ['  mv -- "$HEALING/student.gguf" "$HEALED"']
            if request.distill.is_full
            else ['  ollama-forge merge "$PRUNED" "$HEALING/adapter" --imatrix "$HEALING/imatrix.gguf" -o "$HEALED"']
        ),
        "fi",
        'measure "$HEALED"',
        'CURRENT="$HEALED"',
    ]


def _end(request: PipelineRequest, plan: PipelinePlan, n_parts: int) -> list[str]:
    lines = [
        "",
        f"echo '[{n_parts - 1}/{n_parts}] Comparing with a lower quantization of the original'",
        'LOWER="$WORKDIR/lower.gguf"',
        'if [ ! -e "$LOWER" ]; then',
        f'  ollama-forge quantize "$MODEL" --type {plan.lower_type} --allow-requantize -o "$LOWER"',
        "fi",
        'measure "$LOWER"',
    ]
    if request.quant is not None:
        lines += [
            'FINAL="$WORKDIR/final.gguf"',
            'if [ ! -e "$FINAL" ]; then',
            f'  ollama-forge quantize "$CURRENT" --type {shlex.quote(request.quant)} --allow-requantize -o "$FINAL"',
            "fi",
            'measure "$FINAL"',
        ]
    return lines


def _landing(
    request: PipelineRequest, plan: PipelinePlan, n_parts: int, modelfile: Modelfile, words: Sequence[str]
) -> list[str]:
    """A Modelfile beside the result names it, and says the rest."""
    result = "final" if request.quant is not None else f"step-{plan.steps[-1].number}-healed"
    text = render_modelfile(replace(modelfile, sources=(f"./{result}.gguf",)))
    return [
        "",
        f"echo '[{n_parts}/{n_parts}] Landing the result in Ollama'",
        f'printf %s {shlex.quote(text)} > "$WORKDIR/Modelfile"',
        f'ollama-forge create-from-base -f "$WORKDIR/Modelfile" --name "$NAME"{_tail(words)}',
    ]


def _words(values: Sequence[object]) -> str:
    return " ".join(shlex.quote(str(value)) for value in values)


def _tail(words: Sequence[str]) -> str:
    return f" {_words(words)}" if words else ""


def _options(flag: str, values: Sequence[str]) -> str:
    return "".join(f" {flag} {shlex.quote(value)}" for value in values)


def _remark(text: str) -> str:
    """Text that stays on its comment line: whatever does not print is spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
