"""`downsize`: a smaller model from a larger one. Here: the table of its sub-commands, each in a module of its own."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "prune": ("downsize_prune", "Cut layers, channels, heads or experts that matter least."),
    "distill": ("downsize_distill", "Teach a small model what a large one predicts; heals a model that was cut."),
    "pipeline": ("downsize_pipeline", "Cut, heal, measure, quantize, compare and land, in one resumable command."),
}
"""Sub-command -> (module under `ollama_forge.cli`, one line of help)."""

_PLAIN = "distill"


class DownsizeGroup(click.Group):
    """Knows its sub-commands' names and helps, and imports one only when it is called.

    Options without a sub-command mean `distill`: `downsize --teacher T --student S --name N`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"ollama_forge.cli.{SUBCOMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help") and _PLAIN in SUBCOMMANDS:
            args = [_PLAIN, *args]
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in SUBCOMMANDS.items()])


@click.group(
    "downsize", cls=DownsizeGroup, epilog="Start with: ollama-forge downsize prune llama3.2 --keep 70% --dry-run"
)
def command() -> None:
    """A smaller model from a larger one: cut away what matters least, then heal what is left."""
