"""`doctor`: everything that this tool depends on, looked at deeply; `--fix` mends what a command can mend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import Command, console_options, store_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.doctor_fixes import Fix
    from ollama_forge.jobs.environment import Finding

SIGNS = {"ok": ("✓", "green"), "optional": ("·", "cyan"), "warning": ("!", "yellow"), "missing": ("✗", "red")}


def fix_options(function: Command) -> Command:
    """What `doctor` and `check` take for mending."""
    for option in (
        click.option("--llama-cpp-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where it is built."),
        click.option("--fix-llama-cpp", is_flag=True, help="Build llama.cpp's own programs too (setup-llama-cpp)."),
        click.option("--fix", is_flag=True, help="Mend what a command can mend; each is shown, and asked for."),
    ):
        function = option(function)
    return function


@click.command("doctor", epilog="Examples: ollama-forge doctor   |   ollama-forge doctor --fix")
@fix_options
@click.option(
    "--fix-extra",
    "extras",
    multiple=True,
    type=click.Choice(("train", "llama-cpp-converter")),
    help="Install an optional part too.",
)
@click.option("--plan", "--dry-run", "is_plan", is_flag=True, help="Only show what --fix would run.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask: run what is needed, and what was named.")
@store_option
@console_options
def command(
    fix: bool,
    fix_llama_cpp: bool,
    llama_cpp_dir: Path | None,
    extras: tuple[str, ...],
    is_plan: bool,
    yes: bool,
    store_path: Path | None,
    console: Console,
) -> int:
    """Look deeply at engine, store, server, disks, memory, GPU, extras, tokens, PATH and llama.cpp's programs.

    Exit 1 if something that is needed is missing. Secrets are never shown, only whether they are set.
    """
    from ollama_forge.jobs.doctor import diagnose

    findings = diagnose(store_path)
    if not (fix or fix_llama_cpp or extras or is_plan):
        console.result(document(findings), lambda: show_findings(console, findings))
        return exit_code(findings)
    return mend(
        console,
        findings,
        extras=extras,
        llama_cpp=fix_llama_cpp,
        llama_cpp_dir=llama_cpp_dir,
        is_plan=is_plan,
        yes=yes,
        store_path=store_path,
    )


def mend(
    console: Console,
    findings: Sequence[Finding],
    *,
    extras: Sequence[str] = (),
    llama_cpp: bool = False,
    llama_cpp_dir: Path | None = None,
    is_plan: bool = False,
    yes: bool = False,
    store_path: Path | None = None,
) -> int:
    """Show each fix, ask, run it, and look again."""
    from ollama_forge.jobs.doctor import diagnose
    from ollama_forge.jobs.doctor_fixes import apply_fix, plan_fixes

    fixes = plan_fixes(findings, extras=extras, llama_cpp=llama_cpp, llama_cpp_dir=llama_cpp_dir)
    if is_plan or not fixes:
        plan = {**document(findings), "fixes": [fix.document() for fix in fixes], "done": []}
        console.result(plan, lambda: _show_plan(console, findings, fixes))
        return exit_code(findings)
    if not yes and (console.as_json or not sys.stdin.isatty()):
        raise UsageError(
            "doctor --fix asks before it runs anything, and nobody is there to answer",
            next="ollama-forge doctor --plan shows what it would run; add --yes to run what is needed.",
        )
    done = []
    for fix in fixes:
        console.say(f"{fix.name}: {fix.reason}")
        console.say(f"  $ {fix.line}")
        if (yes and not fix.is_needed) or not (yes or click.confirm("  Run this?", default=fix.is_needed, err=True)):
            console.say("  left as it is")
            continue
        apply_fix(fix, _pass_on)
        done.append(fix)
        console.done(fix.name)
    again = diagnose(store_path)
    after = {**document(again), "fixes": [fix.document() for fix in fixes], "done": [fix.name for fix in done]}
    console.result(after, lambda: show_findings(console, again))
    return exit_code(again)


def _pass_on(text: bytes) -> None:
    sys.stderr.write(text.decode("utf-8", "replace"))
    sys.stderr.flush()


def document(findings: Sequence[Finding]) -> dict[str, object]:
    """The JSON form."""
    return {"ok": exit_code(findings) == 0, "findings": [finding.document() for finding in findings]}


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something that is needed is missing."""
    return int(any(finding.state.value == "missing" for finding in findings))


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """One line for each, and the next step under what needs one."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        sign, colour = SIGNS[finding.state.value]
        console.line(f"{click.style(sign, fg=colour)} {finding.name:<{width}}  {finding.detail}")
        if finding.next:
            console.line(f"  {'':<{width}}  next: {finding.next}")


def _show_plan(console: Console, findings: Sequence[Finding], fixes: Sequence[Fix]) -> None:
    if not fixes:
        show_findings(console, findings)
        console.line()
        console.line("There is nothing that a command could mend.")
        return
    for fix in fixes:
        console.line(f"{fix.name}: {fix.reason}{'' if fix.is_needed else '   (optional)'}")
        console.line(f"  $ {fix.line}")
    console.line("Nothing was run. To run them one by one: ollama-forge doctor --fix")
