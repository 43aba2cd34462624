"""How every command that gets a model from the Hub says what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import report_landed

if TYPE_CHECKING:
    from ollama_forge.jobs.hub import HubLanding


def report_hub_landing(console: Console, done: HubLanding) -> None:
    """Print what came from where, then the landing itself."""
    for warning in done.warnings:
        console.warn(warning)
    listing = done.listing
    licence = f", licence {listing.licence}" if listing.licence else ""
    size = human_bytes(done.downloaded_bytes)
    if done.landed.is_dry_run:
        came = f"{size} to download"
    elif done.downloaded_bytes:
        came = f"{size} downloaded, every hash right"
    else:
        came = "all of it was in the cache, every hash right"
    console.say(f"{listing.repo} at {listing.commit[:12]}{licence}: {came}")
    document = done.document()
    if done.merged is not None:
        from ollama_forge.cli.merge import show_losses

        document["merged"] = done.merged.document()
        for warning in done.merged.warnings:
            console.warn(warning)
        if not console.as_json:
            show_losses(console, done.merged)
    report_landed(console, done.landed, document)
