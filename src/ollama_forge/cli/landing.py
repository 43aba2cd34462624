"""How every command that ends in an Ollama model says what it did."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import Command, console_options, store_option, write_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.landing import LandedModel


def landing_options(function: Command) -> Command:
    """All that every landing command takes; the command receives `options`, a `LandOptions`."""

    @_spelled
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        check: bool,
        host: str | None,
        out_modelfile: Path | None,
        store_path: Path | None,
        force: bool,
        dry_run: bool,
        console: Console,
        **kwargs: Any,
    ) -> Any:
        from ollama_forge.jobs.land_options import LandOptions, find_remote_server

        options = LandOptions(
            store_path,
            overwrite=force,
            dry_run=dry_run,
            check=check,
            progress=console.progress,
            server=find_remote_server(host, store_path),
        )
        if out_modelfile is not None:
            _require_modelfile_place(out_modelfile, options)
        result = function(*args, options=options, console=console, **kwargs)
        if out_modelfile is not None and not dry_run:
            _write_modelfile(out_modelfile, kwargs.get("name"), options)
            console.done(f"Wrote {out_modelfile}")
        return result

    return wrapper


@dataclass(frozen=True)
class HandedOn:
    """The landing options of a command that runs another one: as words of that one's command line."""

    words: tuple[str, ...]
    is_dry_run: bool
    store_path: Path | None


def handed_on_options(function: Command) -> Command:
    """The same options, and `--plan`, for a command that runs a landing one; it receives `landing`, a `HandedOn`."""

    @click.option("--plan", "is_plan", is_flag=True, help="The same as --dry-run.")
    @_spelled
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        check: bool,
        host: str | None,
        out_modelfile: Path | None,
        store_path: Path | None,
        force: bool,
        dry_run: bool,
        is_plan: bool,
        **kwargs: Any,
    ) -> Any:
        is_dry_run = dry_run or is_plan
        words = [] if check else ["--no-check"]
        words += ["--host", host] if host else []
        words += ["--out-modelfile", str(out_modelfile)] if out_modelfile else []
        words += ["--store", str(store_path)] if store_path else []
        words += ["--force"] if force else []
        words += ["--dry-run"] if is_dry_run else []
        return function(*args, landing=HandedOn(tuple(words), is_dry_run, store_path), **kwargs)

    return wrapper


def _spelled(function: Command) -> Command:
    """The options, one below the other in this order in every command's help."""
    for option in (
        console_options,
        write_options,
        store_option,
        click.option(
            "--out-modelfile",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write the model's Modelfile there, too.",
        ),
        click.option("--host", metavar="URL", help="Land in this running Ollama through its API, not in a store."),
        click.option("--check/--no-check", default=True, help="Run the model before it gets its name (default: yes)."),
    ):
        function = option(function)
    return function


def _require_modelfile_place(path: Path, options: LandOptions) -> None:
    from ollama_forge.files import refuse_existing

    if options.server is not None:
        raise UsageError(
            "--out-modelfile reads the finished model, and a server keeps it",
            next="Leave it out, then: ollama show --modelfile NAME",
        )
    refuse_existing(path, overwrite=options.overwrite)


def _write_modelfile(path: Path, name: str | None, options: LandOptions) -> None:
    """The Modelfile of what was landed: under the name that was reported, else under the one that was asked for."""
    from ollama_forge.files import write_bytes
    from ollama_forge.store.catalog import open_store
    from ollama_forge.store.modelfile import render_modelfile

    landed = click.get_current_context().meta.get(_LANDED_NAME) or name
    if landed is None:
        raise UsageError("--out-modelfile is for what lands in Ollama, and nothing did", next="Add --name NAME.")
    modelfile = open_store(options.store_path).find(landed).modelfile()
    write_bytes(path, render_modelfile(modelfile).encode(), overwrite=options.overwrite)


_LANDED_NAME = "ollama_forge.landed_name"


def note_landed(name: str) -> None:
    """Remember what was landed, for the options that every landing command has."""
    click.get_current_context().meta[_LANDED_NAME] = name


def report_landed(console: Console, landed: LandedModel, extra: dict[str, Any] | None = None) -> None:
    """Print the result of a landing: JSON, or the lines for people."""
    note_landed(landed.name)
    for warning in landed.warnings:
        console.warn(warning)
    console.result({**landed.document(), **(extra or {})}, lambda: show_landed(console, landed))


def show_landed(console: Console, landed: LandedModel) -> None:
    """The lines for people."""
    sizes = f"{human_bytes(landed.written_bytes)} written, {human_bytes(landed.shared_bytes)} shared"
    if landed.is_dry_run:
        verb = "replaced" if landed.replaced else "made"
        console.line(f"{landed.name} would be {verb} in {landed.store}: {sizes}. Nothing was changed.")
        return
    console.line(f"{landed.name}  {landed.digest[:12]}  {sizes}")
    check = landed.check
    if check:
        sample = check.sample.strip().replace("\n", " ")
        console.done(f"It loads, its prompt is {_TEMPLATE_WORDS[check.template]}; it says: {sample[:100]!r}")
        if not check.stopped:
            console.warn(
                "It did not stop by itself in its first words; a base model does that, a chat model should not."
            )
    console.done(f"Landed in {landed.store} in {landed.seconds:.1f} s. Next: ollama run {landed.name}")
    console.say(f"  without a server: ollama-forge run {landed.name}")


_TEMPLATE_WORDS = {
    "equal": "the one of its template (two renderers agree)",
    "none": "plain text (it has no chat template)",
    "server": "the server's own",
    "unrendered": "llama.cpp's alone (the sandboxed template refuses the test conversation)",
}
