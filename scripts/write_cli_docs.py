"""Write docs/cli.md from the commands themselves; `--check` only says whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ollama_forge.cli import COMMANDS, root

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100


def render_reference() -> str:
    """The page: every command of the table with its own help text."""
    parts = [
        "# Commands",
        "",
        "Written by `make docs` from the commands themselves. Every command takes `--help`; exit codes are 0 (done), "
        "1 (failed), 2 (wrong usage) and 130 (interrupted).",
        "",
    ]
    top = click.Context(root, info_name="ollama-forge", max_content_width=WIDTH, terminal_width=WIDTH)
    for title, group in COMMANDS.items():
        parts += [f"## {title.capitalize()}", ""]
        for name in group:
            command = root.get_command(top, name)
            assert command is not None
            parts += _render(command, name, top)
    return "\n".join(parts)


def _render(command: click.Command, name: str, parent: click.Context) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent, max_content_width=WIDTH, terminal_width=WIDTH)
    lines = [f"### {context.command_path}", "", "```text", command.get_help(context), "```", ""]
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            sub = command.get_command(context, child)
            if sub is not None:
                lines += _render(sub, child, context)
    return lines


def main() -> int:
    text = render_reference()
    if "--check" in sys.argv:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            sys.stderr.write(f"{TARGET.name} is not current: run `make docs`\n")
            return 1
        return 0
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
