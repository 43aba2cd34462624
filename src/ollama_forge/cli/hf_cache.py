"""`hf-cache`: what the Hugging Face cache holds, and how to make room in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options

if TYPE_CHECKING:
    from ollama_forge.source.hub_inventory import CachedRepo, Removal


@click.group("hf-cache", epilog="Example: ollama-forge hf-cache ls")
def command() -> None:
    """The cache in which downloads from the Hub are kept (HF_HOME); other tools use the same one."""


@command.command("ls", epilog="Example: ollama-forge hf-cache ls --revisions")
@click.option("--revisions", is_flag=True, help="Show each revision of each repo.")
@click.option("--size", "only_size", is_flag=True, help="Only the total.")
@click.option("--type", "kind", type=click.Choice(("model", "dataset", "space")), help="Only these.")
@console_options
def ls(revisions: bool, only_size: bool, kind: str | None, console: Console) -> None:
    """The repos in the cache, the largest first."""
    from ollama_forge.source.hub_cache import find_hub_cache
    from ollama_forge.source.hub_inventory import read_inventory

    cache = find_hub_cache()
    repos = [repo for repo in read_inventory(cache) if kind in (None, repo.kind)]
    total = sum(repo.size_bytes + repo.unfinished_bytes for repo in repos)

    def show() -> None:
        if not only_size and repos:
            _show_repos(console, repos, revisions=revisions)
        console.line(f"{human_bytes(total)} in {len(repos)} repos in {cache}")

    document = {"cache": str(cache), "size": total, "repos": [] if only_size else [repo.document() for repo in repos]}
    console.result(document, show)


@command.command("rm", epilog="Example: ollama-forge hf-cache rm Qwen/Qwen3-0.6B --dry-run")
@click.argument("repos", nargs=-1, required=True, metavar="REPO[@REVISION]...")
@click.option(
    "--revision", "revisions", multiple=True, metavar="REV", help="Only this one (branch, tag, commit); repeatable."
)
@click.option("--type", "kind", type=click.Choice(("model", "dataset", "space")), default="model", show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what would be removed; change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@console_options
def rm(
    repos: tuple[str, ...], revisions: tuple[str, ...], kind: str, dry_run: bool, yes: bool, console: Console
) -> None:
    """Remove repos, or some of their revisions. What is landed in Ollama stays there."""
    from ollama_forge.source.hub_inventory import apply_removal, plan_removal, read_inventory

    present = read_inventory()
    removals = []
    for text in repos:
        name, _, revision = text.partition("@")
        wanted = (*revisions, revision) if revision else revisions
        removals.append(plan_removal(present, name, wanted, kind=kind))
    freed = sum(removal.freed_bytes for removal in removals)
    if not dry_run:
        for removal in removals:
            console.say(_words(removal))
        console.confirm(f"Remove them ({human_bytes(freed)})?", assume_yes=yes)
        for removal in removals:
            apply_removal(removal)

    def show() -> None:
        if dry_run:
            for removal in removals:
                console.line(_words(removal))
        would = "would be freed. Nothing was changed." if dry_run else "freed."
        console.line(f"{human_bytes(freed)} {would}")

    document = {"removed": [removal.document() for removal in removals], "freed_bytes": freed, "dry_run": dry_run}
    console.result(document, show)


def _words(removal: Removal) -> str:
    repo = removal.repo
    size = human_bytes(removal.freed_bytes)
    if removal.is_whole:
        unfinished = f", {human_bytes(repo.unfinished_bytes)} of it unfinished" if repo.unfinished_bytes else ""
        return f"{repo.kind} {repo.repo}, whole: {size}{unfinished}"
    names = ", ".join("/".join((revision.commit[:12], *revision.refs)) for revision in removal.revisions)
    return f"{repo.kind} {repo.repo}, revision {names}: {size}; what other revisions share stays"


def _show_repos(console: Console, repos: list[CachedRepo], *, revisions: bool) -> None:
    if not revisions:
        rows = [
            (
                repo.repo,
                repo.kind,
                human_bytes(repo.size_bytes),
                str(len(repo.revisions)),
                human_bytes(repo.unfinished_bytes) if repo.unfinished_bytes else "",
            )
            for repo in repos
        ]
        columns = ("REPO", "TYPE", "SIZE", "REVISIONS", "UNFINISHED")
        console.table(columns, rows, right=("SIZE", "REVISIONS", "UNFINISHED"))
        return
    lines = [
        (repo.repo, repo.kind, revision.commit[:12], ", ".join(revision.refs), human_bytes(revision.size_bytes))
        for repo in repos
        for revision in repo.revisions
    ]
    console.table(("REPO", "TYPE", "COMMIT", "REFS", "SIZE"), lines, right=("SIZE",))
