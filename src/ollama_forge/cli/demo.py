"""`demo`: the whole way once, on the model that ships with the package."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options

if TYPE_CHECKING:
    from ollama_forge.jobs.finetune import FinetuneResult

_NAME = "ollama-forge"


@click.command("demo", epilog="Example: ollama-forge demo")
@click.option(
    "--store",
    "store_path",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-store"),
    show_default=True,
    metavar="DIR",
    help="The demo's own models folder; Ollama's, and your registry, are not touched.",
)
@console_options
def command(store_path: Path, console: Console) -> int:
    """Import, quantize, land, customise, fine-tune and run a small model. No Ollama, GPU or network needed."""
    from ollama_forge.jobs.demo import PERSONA, run_demo
    from ollama_forge.jobs.lineage import recording_in

    with recording_in(store_path.absolute() / "model_registry.json"):
        result = run_demo(store_path.absolute(), console.say)

    def show() -> None:
        console.line()
        console.table(
            ("MODEL", "WRITTEN", "SHARED", "WHAT"),
            [
                ("(source)", human_bytes(result.source_bytes), "", "16-bit safetensors"),
                ("demo", human_bytes(result.plain.written_bytes), human_bytes(result.plain.shared_bytes), "Q4_K_M"),
                (
                    "demo-pirate",
                    human_bytes(result.custom.written_bytes),
                    human_bytes(result.custom.shared_bytes),
                    f"+ system prompt {PERSONA!r}",
                ),
                *_trained_row(result.trained),
            ],
            right=("WRITTEN", "SHARED"),
        )
        for question, said in result.answers.items():
            console.line()
            console.line(click.style(question, bold=True))
            for name, text in said.items():
                console.line(f"  {name:<12} {text.strip()}")
        console.line()
        whole = "whole" if result.report.is_whole else "damaged"
        console.line(f"The store is {whole}: {result.report.n_blobs} blobs hashed. {result.seconds:.1f} s in all.")
        program = _program()
        console.line(f"Look around: OLLAMA_MODELS={shlex.quote(str(store_path))} {program} list   (or: ollama serve)")
        console.line(f"Your own:    {program} start   (or: {program} import ./my-model --name my-model)")

    console.result(result.document(), show)
    return 0 if result.report.is_whole else 1


def _program() -> str:
    """This program as it can be typed here: `make demo` installs it into .venv, which no PATH leads to."""
    beside = Path(sys.executable).parent / _NAME
    if shutil.which(_NAME) is not None or not beside.is_file():
        return _NAME
    folder = Path.cwd()
    return shlex.quote(str(beside.relative_to(folder) if beside.is_relative_to(folder) else beside))


def _trained_row(trained: FinetuneResult | None) -> list[tuple[str, str, str, str]]:
    if trained is None or trained.landed is None or trained.trained is None:
        return []
    landed, run = trained.landed, trained.trained
    learnt = f"+ adapter: {run.steps} steps in {run.seconds:.0f} s, loss {run.base_loss:.2f} -> {run.final_loss:.2f}"
    return [("demo-robots", human_bytes(landed.written_bytes), human_bytes(landed.shared_bytes), learnt)]
