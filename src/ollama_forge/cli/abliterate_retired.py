"""Sub-commands of the predecessors that are not needed here: each says what does its work now."""

from __future__ import annotations

import click

from ollama_forge.errors import UsageError

RETIRED: dict[str, tuple[str, str]] = {
    "chat": (
        "The abliterated model is an Ollama model, or a GGUF, like any other.",
        "ollama-forge run NAME   (or: ollama run NAME)",
    ),
    "serve": (
        "A second server beside Ollama is not needed: the model is landed in Ollama, whose API serves it.",
        "ollama serve, and then any client; without a server: ollama-forge run NAME",
    ),
    "proxy": (
        "The model keeps its own chat template, so nothing has to rewrite what clients send to Ollama.",
        "Point the client at Ollama itself (http://127.0.0.1:11434).",
    ),
    "fix-ollama-template": (
        "The chat template stays in the GGUF as it was, and landing checks that Ollama's prompt is the one it means.",
        "To change it: ollama-forge create-from-base --base NAME --name NEW --template @FILE",
    ),
    "download-lists": (
        "This package ships and fetches no lists of harmful prompts: bring your own, one prompt a line.",
        "ollama-forge abliterate run --model REF --name NAME --harmful refused.txt --harmless answered.txt",
    ),
}
"""Sub-command -> (why it is not needed, what to type instead)."""


def make_retired(name: str) -> click.Command:
    """A command that takes any words and says what to type instead."""
    why, instead = RETIRED[name]

    @click.command(
        name,
        hidden=True,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": True},
        help=f"Not needed: {why}",
        epilog=f"Instead: {instead}",
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def retired(words: tuple[str, ...]) -> None:
        raise UsageError(f"`abliterate {name}` is not needed any more", why=why, next=instead)

    return retired
