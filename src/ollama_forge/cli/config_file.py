"""`--config FILE`: options from a YAML or JSON file; what stands on the command line wins."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli.options import Command
from ollama_forge.errors import UsageError


def config_option(function: Command) -> Command:
    """A flat file of option names (`lr: 1e-4`, `max-length: 512`) becomes the defaults of this command."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load,
        metavar="FILE",
        help="Options from a YAML or JSON file; the command line wins.",
    )(function)


def _load(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:
        return
    known = {option.name: option for option in ctx.command.params if isinstance(option, click.Option) and option.name}
    by_flag = {flag.lstrip("-").replace("-", "_"): name for name, option in known.items() for flag in option.opts}
    defaults: dict[str, Any] = {}
    for key, value in _read(path).items():
        word = str(key).replace("-", "_")
        name = word if word in known else by_flag.get(word)
        if name is None:
            near = difflib.get_close_matches(word, [*known, *by_flag], n=1)
            hint = f"Did you mean {near[0].replace('_', '-')!r}? " if near else ""
            raise UsageError(
                f"{str(path)!r} has an unknown option {str(key)!r}",
                why=f"{hint}The names are those of the command's options.",
                next=f"{ctx.command_path} --help",
            )
        is_single = known[name].multiple and not isinstance(value, list)
        defaults[name] = [value] if is_single else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _read(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise UsageError(
            f"The config file {str(path)!r} could not be read: {exc}", next="It is YAML or JSON, one option a line."
        ) from exc
    if not isinstance(document, dict):
        raise UsageError(
            f"The config file {str(path)!r} is not a list of options", next="Write `name: value`, one option a line."
        )
    return document
