"""`registry`: where a model came from, and what two models do not have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options
from ollama_forge.cli.registry_options import dry_run_option, registry_option

_SHOWN = 100


@click.command("lineage", epilog="Example: ollama-forge registry lineage my-model --html lineage.html")
@click.argument("ref")
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it as a page."
)
@click.option("--force", is_flag=True, help="Replace the page.")
@registry_option
@console_options
def lineage(ref: str, html_path: Path | None, force: bool, registry_path: Path | None, console: Console) -> None:
    """What REF was made from, and how, back to where the records begin."""
    from ollama_forge.files import write_bytes
    from ollama_forge.registry.lineage import render_page, render_tree, trace_origin
    from ollama_forge.registry.registry_file import find_registry, read_registry

    origin = trace_origin(read_registry(find_registry(registry_path)), ref)
    if html_path is not None:
        write_bytes(html_path, render_page(origin).encode(), overwrite=force)
        console.done(f"Written: {html_path}")

    def human() -> None:
        for line in render_tree(origin):
            console.line(line)
        if origin.landing is None:
            console.line("How it was made is not recorded: it was not this tool, or not with this registry.")

    console.result(origin.document(), human)


@click.command("diff", epilog="Example: ollama-forge registry diff my-model my-model:old")
@click.argument("ref_a")
@click.argument("ref_b")
@registry_option
@console_options
def diff(ref_a: str, ref_b: str, registry_path: Path | None, console: Console) -> None:
    """What is different between two models: what they are, their blobs, and how they were made."""
    from ollama_forge.registry.lineage import compare_models
    from ollama_forge.registry.registry_file import find_registry, read_registry

    rows = compare_models(read_registry(find_registry(registry_path)), ref_a, ref_b)

    def human() -> None:
        for row in rows:
            console.line(row.field)
            console.line(f"  - {_short(row.before)}")
            console.line(f"  + {_short(row.after)}")
        if not rows:
            console.line("Nothing is different.")

    console.result({row.field: {"a": row.before, "b": row.after} for row in rows}, human)


@click.command("rebuild", epilog="Example: ollama-forge registry rebuild my-model --dry-run")
@click.argument("ref")
@click.option("--whole", is_flag=True, help="Also what it was made from, as far back as the records go.")
@registry_option
@dry_run_option
@console_options
def rebuild_model(ref: str, whole: bool, registry_path: Path | None, dry_run: bool, console: Console) -> int:
    """Make REF again from its record, beside the one that is there, and say whether the digest is the same.

    Whatever was made here can be made again, trained models too (on a processor with the same digest); a recipe's
    model by `build --locked`, one that a server taught not at all. Exit code 1 when the digest differs.
    """
    from ollama_forge.jobs.rebuild import rebuild
    from ollama_forge.registry.registry_file import find_registry, read_registry

    document = read_registry(find_registry(registry_path))
    rebuilt = rebuild(document, ref, whole=whole, dry_run=dry_run, progress=console.progress)

    def human() -> None:
        for step in rebuilt.steps:
            console.line(f"{step.step}: {step.name}  from {', '.join(step.sources)}")
        if rebuilt.is_dry_run:
            console.line("Everything that it needs is there. Nothing was changed.")
        else:
            console.line(f"recorded  {rebuilt.recorded_digest}")
            console.line(f"now       {rebuilt.digest}  {'the same' if rebuilt.is_same else 'ANOTHER'}")

    console.result(rebuilt.document(), human)
    return 0 if dry_run or rebuilt.is_same else 1


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


COMMANDS: tuple[click.Command, ...] = (lineage, diff, rebuild_model)
