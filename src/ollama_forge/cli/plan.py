"""`plan`: what a command would do, exactly, as a file that runs only while its inputs are what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.invoke import find_command, run_for_document, run_words, spoken
from ollama_forge.cli.options import console_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.recipe.command_plan import CommandPlan, PlanInput, PlannedCommand

_ALIASES = {"start": "start", "quickstart": "start", "train": "finetune"}
_PINNED = ("fetch", "import", "fetch-adapter")


@click.command(
    "plan",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Examples: ollama-forge plan -o plan.json fetch org/name-GGUF --name mine"
    "   |   ollama-forge plan run plan.json   |   ollama-forge plan start --profile fast",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the plan in this file.")
@click.option("--force", is_flag=True, help="Replace that file.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="COMMAND [ARGS]...")
@console_options
def command(output: Path | None, force: bool, words: tuple[str, ...], console: Console) -> None:
    """Show what COMMAND would do: its steps, disk, memory and time; nothing is changed.

    COMMAND is start, auto, fetch, import, convert, fetch-adapter, create-from-base, quantize, merge, retrain, finetune,
    build, or adapters recommend --apply. The options of `plan` come before it. `plan run FILE` does what a plan says,
    if everything that it reads is still the same.
    """
    if not words:
        raise UsageError("plan needs a COMMAND", next="Example: ollama-forge plan start --profile fast")
    name, rest = words[0], list(words[1:])
    console, rest = _take_console(console, rest)
    if name == "run":
        _run(console, rest)
        return
    if name == "continue":
        raise UsageError(
            "There is no last plan to continue",
            why="A plan is a file that you name, never one that happens to lie in this folder.",
            next="ollama-forge plan -o plan.json COMMAND ...   then: ollama-forge plan run plan.json",
        )
    if name == "doctor-fix":
        run_words(["doctor", "--plan", *rest, *(["--json"] if console.as_json else [])])
        return
    if name == "adapters-apply":
        name, rest = "adapters", ["recommend", "--apply", *rest]
    output, rest = _take_output(output, name, rest)
    plan = _make(console, _ALIASES.get(name, name), rest)
    if output is not None:
        from ollama_forge.recipe.command_plan import write_plan

        write_plan(output, plan, overwrite=force)
    console.result({**plan.document(), "file": str(output) if output else None}, lambda: _show(console, plan, output))


def _take_console(console: Console, rest: list[str]) -> tuple[Console, list[str]]:
    """`--json` and `--quiet` mean the plan's own output, wherever they stand."""
    as_json = console.as_json or "--json" in rest
    is_quiet = console.is_quiet or any(word in ("-q", "--quiet") for word in rest)
    kept = [word for word in rest if word not in ("--json", "-q", "--quiet", "--dry-run", "--plan")]
    return dataclasses.replace(console, as_json=as_json, is_quiet=is_quiet), kept


def _take_output(output: Path | None, name: str, rest: list[str]) -> tuple[Path | None, list[str]]:
    """`-o FILE` behind the command is the plan's where the command has no `-o` of its own."""
    if output is not None or "-o" not in rest:
        return output, rest
    found, _ = find_command([name, *rest])
    if any("-o" in option.opts for option in found.params):
        return output, rest
    at = rest.index("-o")
    if at + 1 == len(rest):
        raise UsageError("-o needs a file", next="Example: -o plan.json")
    return Path(rest[at + 1]), rest[:at] + rest[at + 2 :]


def _make(console: Console, name: str, rest: list[str]) -> CommandPlan:
    from ollama_forge.recipe.command_estimate import estimate_command
    from ollama_forge.recipe.command_plan import PLANNABLE, CommandPlan, PlannedCommand, without_times

    if name not in (*PLANNABLE, "start", "auto", "adapters"):
        raise UsageError(
            f"{name!r} cannot be planned",
            why="It writes nothing, or has no dry run.",
            next="One of: start, auto, " + ", ".join(PLANNABLE),
        )
    document = run_for_document([name, *rest, "--dry-run"])
    words = _exact_words([name, *rest], document)
    if words[0] not in PLANNABLE:
        raise UsageError(f"{name!r} would run {words[0]!r}, which cannot be planned", next=spoken([name, *rest]))
    _, params = _parse(words)
    inputs = _inputs(words[0], params, document)
    step = PlannedCommand(
        command=words[0],
        arguments=tuple(words[1:]),
        estimate=estimate_command(words[0], document),
        dry_run=without_times(document),
    )
    return CommandPlan(steps=(step,), inputs=inputs)


def _exact_words(typed: list[str], document: dict[str, Any]) -> list[str]:
    """The command that does just this: what `start` and `auto` chose, with commits and files instead of branches."""
    words = [word for word in document.get("command", typed) if word != "--dry-run"]
    if words[0] == "adapters":
        if "repo" not in document:
            raise UsageError("adapters recommend is planned with --apply", next=spoken([*typed, "--apply"]))
        _, params = _parse(words)
        store = ["--store", str(params["store_path"])] if params.get("store_path") else []
        words = ["fetch-adapter", document["repo"], "--base", params["base"], "--name", params["name"], *store]
    if words[0] in _PINNED and document.get("commit"):
        words = _without(words, "--revision")
        words += ["--revision", document["commit"]]
    if words[0] == "fetch" and document.get("files") and not {"--quant", "--gguf-file"} & set(words):
        words += ["--gguf-file", document["files"][0]]
    return words


def _without(words: Sequence[str], option: str) -> list[str]:
    kept: list[str] = []
    for number, word in enumerate(words):
        if word == option or (number and words[number - 1] == option) or word.startswith(option + "="):
            continue
        kept.append(word)
    return kept


def _parse(words: Sequence[str]) -> tuple[click.Command, dict[str, Any]]:
    """The arguments as the command itself understands them.

    Raises:
        click.UsageError: it does not.
    """
    found, rest = find_command(words)
    with found.make_context(words[0], list(rest)) as context:
        return found, dict(context.params)


def _inputs(
    name: str, params: dict[str, Any], document: dict[str, Any] | None = None, *, fresh: bool = False
) -> tuple[PlanInput, ...]:
    from ollama_forge.recipe.command_plan import PlanInput, plan_inputs

    found = plan_inputs(name, params, fresh=fresh)
    if name != "build":
        return found
    if document is None:
        words = ["build", str(params["recipe"]), "--dry-run"]
        words += [word for setting in params["settings"] for word in ("--set", setting)]
        words += ["--store", str(params["store_path"])] if params.get("store_path") else []
        words += ["--force"] if params.get("force") else []
        document = run_for_document(words)
    return (*found, PlanInput(kind="build", ref=str(params["recipe"]), hash=document["key"]))


def _run(console: Console, rest: list[str]) -> None:
    from ollama_forge.recipe.command_plan import read_plan, refuse_changes

    if len(rest) != 1:
        raise UsageError("plan run takes one file", next="Example: ollama-forge plan run plan.json")
    plan = read_plan(Path(rest[0]))
    now: list[PlanInput] = []
    for step in plan.steps:
        _, params = _parse(step.words)
        now += _inputs(step.command, params, fresh=True)
    refuse_changes(plan.inputs, now)
    documents = []
    for step in plan.steps:
        console.say(f"→ {spoken(step.words)}")
        if console.as_json:
            documents.append({"command": step.words, "result": run_for_document(step.words)})
        else:
            run_words(step.words)
    if console.as_json:
        console.result({"plan": rest[0], "steps": documents})


def _show(console: Console, plan: CommandPlan, output: Path | None) -> None:
    rows = [(str(number), step.command, *_estimated(step)) for number, step in enumerate(plan.steps, 1)]
    console.table(
        ("STEP", "COMMAND", "DISK", "DOWNLOAD", "MEMORY", "ABOUT"), rows, right=("DISK", "DOWNLOAD", "MEMORY")
    )
    for step in plan.steps:
        console.line(f"  {spoken(step.words)}")
    for item in plan.inputs:
        console.line(f"  reads {item.ref}  {item.kind} {item.hash[:12]}")
    if output is None:
        console.line("Nothing was changed. To keep it: ollama-forge plan -o plan.json COMMAND ...")
    else:
        console.line(f"Nothing was changed. Do it: ollama-forge plan run {output}")


def _estimated(step: PlannedCommand) -> tuple[str, str, str, str]:
    from ollama_forge.cli.build import human_seconds

    found = step.estimate
    return (
        "?" if found.disk_bytes is None else human_bytes(found.disk_bytes),
        human_bytes(found.download_bytes) if found.download_bytes else "",
        "?" if found.memory_bytes is None else human_bytes(found.memory_bytes),
        "?" if found.seconds is None else human_seconds(found.seconds),
    )
