"""`verify`: is the store whole?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option

if TYPE_CHECKING:
    from ollama_forge.store.verify import StoreReport


@click.command("verify", epilog="Examples: ollama-forge verify   |   ollama-forge verify llama3.2 --json")
@click.argument("refs", nargs=-1, metavar="[REF]...")
@click.option("--quick", is_flag=True, help="Measure the blobs, do not hash them.")
@store_option
@console_options
def command(refs: tuple[str, ...], quick: bool, store_path: Path | None, console: Console) -> int:
    """Re-hash blobs, check manifests, list orphans and what is missing. Exit 1 if something is wrong."""
    from ollama_forge.store.catalog import open_store
    from ollama_forge.store.verify import count_bytes, verify_store

    store = open_store(store_path)
    if not store.models_dir.exists():
        console.warn(f"{store.models_dir} does not exist, so there is nothing to verify. Is it the right folder?")
    total_bytes = 0 if quick else count_bytes(store, refs)
    with console.progress("Hashing", total_bytes) as advance:
        report = verify_store(store, refs, quick=quick, advance=advance)
    console.result(_document(report), lambda: _show(console, report))
    return 0 if report.is_whole else 1


def _document(report: StoreReport) -> dict[str, Any]:
    return {
        "whole": report.is_whole,
        "models": [name.display for name in report.models],
        "problems": [{"kind": p.kind, "path": str(p.path), "what": p.what} for p in report.problems],
        "orphans": [str(path) for path in report.orphans],
        "orphan_bytes": report.orphan_bytes,
        "leftovers": [str(path) for path in report.leftovers],
        "stages": [str(path) for path in report.stages],
        "blobs": report.n_blobs,
        "hashed_bytes": report.hashed_bytes,
    }


def _show(console: Console, report: StoreReport) -> None:
    for problem in report.problems:
        console.line(click.style(f"✗ {problem.kind}", fg="red") + f"  {problem.path}: {problem.what}")
    if report.problems:
        console.line("  next: `ollama pull` a damaged model again, or remove it: ollama-forge rm NAME.")
    if report.orphans:
        console.line(
            f"· {len(report.orphans)} blobs ({human_bytes(report.orphan_bytes)}) belong to no model; "
            "Ollama removes them at its next start."
        )
    for path in (*report.leftovers, *report.stages):
        console.line(f"· left over: {path}")
    verdict = "whole" if report.is_whole else f"not whole: {len(report.problems)} problems"
    console.line(
        f"{len(report.models)} models, {report.n_blobs} blobs, {human_bytes(report.hashed_bytes)} hashed: {verdict}"
    )
