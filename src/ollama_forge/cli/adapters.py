"""`adapters`: look at adapters and turn them from one form into the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import console_options, store_option, write_options
from ollama_forge.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.adapter_check import AdapterReport
    from ollama_forge.jobs.adapter_search import AdapterHit, Recommendation
    from ollama_forge.jobs.adapters import ConvertedAdapter
    from ollama_forge.jobs.land_options import LandOptions

_MARKS = {"ok": ("✓", "green"), "differs": ("✗", "red"), "unknown": ("?", "yellow")}


@click.group("adapters", epilog="Example: ollama-forge adapters check ./my-adapter --base llama3.2")
def command() -> None:
    """Adapters (LoRA): find one, see whether it fits a model, and turn it into the other format."""


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
    done = convert_adapter(
        adapter, output, model, outtype=outtype.lower(), store_path=store_path, overwrite=force, dry_run=dry_run
    )
    for warning in done.warnings:
        console.warn(warning)
    console.result(done.document(), lambda: _show_converted(console, done))


@command.command("search", epilog="Example: ollama-forge adapters search qwen3 sql")
@click.argument("query", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1, 100), default=10, show_default=True, help="How many to show.")
@console_options
def search(query: tuple[str, ...], limit: int, console: Console) -> None:
    """Adapters on the Hugging Face Hub whose name has the words of QUERY; repos that hold none are left out."""
    from ollama_forge.jobs.adapter_search import search_adapters

    found = search_adapters(" ".join(query), limit=limit)

    def show() -> None:
        _show_hits(console, found.hits)
        if found.left_out:
            console.say(f"{found.left_out} more repos have these words and hold no adapter.")

    console.result({"adapters": [hit.document() for hit in found.hits], "left_out": found.left_out}, show)


@command.command("recommend", epilog="Example: ollama-forge adapters recommend --base llama3.2")
@click.option("--base", required=True, metavar="REF", help="The base: an Ollama name, a .gguf file, hf:org/name.")
@click.option("--base-repo", default="", metavar="ORG/NAME", help="Its repo on the Hub, where its file does not say.")
@click.option("--query", default="", metavar="WORDS", help="Only adapters whose name has these words.")
@click.option("--limit", type=click.IntRange(1, 50), default=5, show_default=True, help="How many to look into.")
@click.option("--apply", "apply_best", is_flag=True, help="Land the first usable one on the base.")
@click.option("--name", help="With --apply: the Ollama model to make.")
@landing_options
def recommend(
    base: str,
    base_repo: str,
    query: str,
    limit: int,
    apply_best: bool,
    name: str | None,
    options: LandOptions,
    console: Console,
) -> None:
    """Adapters that were trained on a base, by the tags and the adapter_config.json of their repos."""
    from ollama_forge.jobs.adapter_search import recommend_adapters

    if apply_best and not name:
        raise UsageError("--apply makes an Ollama model, so it needs --name", next="Add --name NAME.")
    found = recommend_adapters(base, options.store_path, base_repo=base_repo, query=query, limit=limit)
    if not apply_best:
        console.result(found.document(), lambda: _show_recommendation(console, found))
        return
    if found.best is None:
        raise NotFoundError(
            f"No adapter that can be used says that it was trained on {found.base_repo}",
            next="Look for one by words: ollama-forge adapters search WORDS",
        )
    from ollama_forge.cli.hub_report import report_hub_landing
    from ollama_forge.jobs.hub import land_adapter
    from ollama_forge.source.hub_files import RepoName
    from ollama_forge.store.modelfile import Modelfile

    console.say(f"{found.best.repo}: {'; '.join(found.best.evidence)}")
    assert name is not None
    named = RepoName(found.best.repo, found.best.commit)
    report_hub_landing(console, land_adapter(named, base, name, Modelfile(), options))


def _show_recommendation(console: Console, found: Recommendation) -> None:
    console.say(f"{found.base} comes from {found.base_repo}: {'; '.join(found.evidence)}")
    _show_hits(console, found.hits)
    if found.best is not None:
        console.say(f"Next: ollama-forge fetch-adapter {found.best.repo} --base {found.base} --name NAME")


def _show_hits(console: Console, hits: Sequence[AdapterHit]) -> None:
    for hit in hits:
        facts = [hit.form, f"licence {hit.licence or 'not said'}", f"{human_count(hit.downloads)} downloads"]
        if hit.size_bytes:
            facts.insert(1, human_bytes(hit.size_bytes))
        console.line(click.style(hit.repo, bold=True) + "  " + ", ".join(facts))
        for text in hit.evidence:
            console.line(f"    {text}")
        if hit.obstacle:
            console.line(click.style(f"    cannot be used: {hit.obstacle}", fg="red"))
    if not hits:
        console.line("No adapter was found.")


def _show_report(console: Console, report: AdapterReport) -> None:
    for verdict in report.verdicts:
        is_hint = verdict.state == "differs" and not verdict.is_fatal
        sign, colour = ("!", "yellow") if is_hint else _MARKS[verdict.state]
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
