"""`adapters`: look at adapters and turn them from one form into the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, write_options

if TYPE_CHECKING:
    from ollama_forge.jobs.adapter_check import AdapterReport
    from ollama_forge.jobs.adapters import ConvertedAdapter

_MARKS = {"ok": ("✓", "green"), "differs": ("✗", "red"), "unknown": ("?", "yellow")}


@click.group("adapters", epilog="Example: ollama-forge adapters check ./my-adapter --base llama3.2")
def command() -> None:
    """Adapters (LoRA): does one fit a model, and what is it in the other format."""


@command.command("check", epilog="Example: ollama-forge adapters check ./my-adapter --base llama3.2")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", required=True, metavar="REF", help="The base: an Ollama name, a .gguf file or a folder.")
@store_option
@console_options
def check(adapter: Path, base: str, store_path: Path | None, console: Console) -> int:
    """Whether an adapter fits a base: family, targets, shapes, rank, numbers, tokenizer, name; each with evidence.

    Exit code 1 when it cannot be used on that base.
    """
    from ollama_forge.jobs.adapter_check import check_adapter
    from ollama_forge.jobs.resolve import resolve

    report = check_adapter(adapter, resolve(base, store_path))
    console.result(report.document(), lambda: _show_report(console, report))
    return 0 if report.fits else 1


@command.command("convert", epilog="Example: ollama-forge adapters convert ./my-adapter -o lora.gguf --base llama3.2")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A name that ends with .gguf makes a LoRA GGUF, any other a PEFT folder.",
)
@click.option(
    "--base", metavar="REF_OR_FOLDER", help="The base: an Ollama name, a .gguf file, or config.json's folder."
)
@click.option(
    "--outtype", type=click.Choice(("f32", "f16", "bf16"), case_sensitive=False), default="f32", show_default=True
)
@write_options
@store_option
@console_options
def convert(
    adapter: Path,
    output: Path,
    base: str | None,
    outtype: str,
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """A PEFT folder becomes the LoRA GGUF that Ollama and llama.cpp load, or the other way round."""
    from ollama_forge.jobs.adapters import convert_adapter
    from ollama_forge.jobs.resolve import resolve

    model = resolve(base, store_path) if base else None
    done = convert_adapter(adapter, output, model, outtype=outtype.lower(), overwrite=force, dry_run=dry_run)
    for warning in done.warnings:
        console.warn(warning)
    console.result(done.document(), lambda: _show_converted(console, done))


def _show_report(console: Console, report: AdapterReport) -> None:
    for verdict in report.verdicts:
        sign, colour = _MARKS[verdict.state]
        sides = " / ".join(text for text in (verdict.adapter, verdict.base) if text)
        console.line(click.style(f"{sign} {verdict.name:<10}", fg=colour) + (f" {sides}" if sides else ""))
        console.line(f"             {verdict.evidence}")
    words = "fits" if report.fits else "cannot be used on"
    console.line(f"{report.path} ({report.kind}) {words} {report.base}.")
    if report.fits:
        merged = " --merge" if report.needs_merge else ""
        console.say(f"Next: ollama-forge retrain --base {report.base} --adapter {report.path} --name NAME{merged}")


def _show_converted(console: Console, done: ConvertedAdapter) -> None:
    ranks = ", ".join(str(rank) for rank in done.ranks)
    console.line(f"{done.output}  {done.kind}, {done.pairs} matrices, rank {ranks}, {human_bytes(done.size_bytes)}")
    if done.folded:
        console.say(f"  {len(done.folded)} matrices have a scale of their own, which was multiplied into them.")
    if done.is_dry_run:
        console.line("Nothing was written.")
    elif done.output.suffix == ".gguf":
        console.done(f"Written. Next: ollama-forge retrain --base BASE --adapter {done.output} --name NAME")
