"""`abliterate`: take a direction out of what a model writes. Here: the table of its sub-commands."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "compute-dir": ("abliterate_compute_dir", "Find the directions in which refused and answered prompts differ."),
    "apply": ("abliterate_apply", "Take directions out of the weights, back into the same quantization."),
    "run": ("abliterate_run", "All of it in one command: compute, choose, apply, land, evaluate before and after."),
    "evaluate": ("abliterate_evaluate", "How often a model refuses, in full answers, and what that cost it."),
    "optimize": ("abliterate_optimize", "Search for the ablation with few refusals and little harm."),
}
"""Sub-command -> (module under `ollama_forge.cli`, one line of help)."""


class AbliterateGroup(click.Group):
    """Knows its sub-commands' names and helps, and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            from ollama_forge.cli.abliterate_retired import RETIRED, make_retired

            return make_retired(cmd_name) if cmd_name in RETIRED else None
        module = importlib.import_module(f"ollama_forge.cli.{SUBCOMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in SUBCOMMANDS.items()])


@click.group(
    "abliterate",
    cls=AbliterateGroup,
    epilog="Start with: ollama-forge abliterate compute-dir --model llama3.2 --harmful refused.txt "
    "--harmless answered.txt -o direction.safetensors",
)
def command() -> None:
    """Take a direction, such as the one of refusals, out of all that a model writes.

    You bring the prompts: this package has no list of them. docs/abliterate.md says what the technique is for, what it
    removes and what it risks.
    """
