"""`check`: what is here, and the next step where something is missing."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.doctor import document, exit_code, fix_options, mend, show_findings
from ollama_forge.cli.options import console_options, store_option


@click.command("check", epilog="Example: ollama-forge check --json   (ollama-forge doctor looks deeper)")
@fix_options
@click.option("-y", "--yes", is_flag=True, help="With --fix: do not ask.")
@store_option
@console_options
def command(
    fix: bool, fix_llama_cpp: bool, llama_cpp_dir: Path | None, yes: bool, store_path: Path | None, console: Console
) -> int:
    """What is here: engine, store and its path, server and its version, extras, disk. Exit 1 if a need is missing."""
    if fix or fix_llama_cpp:
        from ollama_forge.jobs.doctor import diagnose

        return mend(
            console,
            diagnose(store_path),
            llama_cpp=fix_llama_cpp,
            llama_cpp_dir=llama_cpp_dir,
            yes=yes,
            store_path=store_path,
        )
    from ollama_forge.jobs.environment import inspect_environment

    findings = inspect_environment(store_path)
    console.result(document(findings), lambda: show_findings(console, findings))
    return exit_code(findings)
