"""`setup-llama-cpp`: llama.cpp's own programs, for those who want them; nothing here needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.external_program import Output
    from ollama_forge.jobs.native_tools import NativeTool


@click.command(
    "setup-llama-cpp",
    epilog="Examples: ollama-forge setup-llama-cpp --dry-run   |   "
    "ollama-forge setup-llama-cpp --source ./llama.cpp --dir ~/llama-tools",
)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where it is built (default: ~/.ollama-forge/llama.cpp)."
)
@click.option("--ref", metavar="TAG", help="The tag to build (default: the pinned one; --dry-run shows it).")
@click.option("--commit", default="", metavar="SHA1", help="What commit --ref must be, or nothing is built.")
@click.option("--source", type=click.Path(path_type=Path), help="Build this source folder; nothing is downloaded.")
@click.option("--repository", metavar="URL", help="A mirror of llama.cpp's repository to fetch from.")
@click.option("--cuda", is_flag=True, help="Build for NVIDIA cards (needs the CUDA toolkit).")
@click.option("-j", "--jobs", type=click.IntRange(1, 1024), metavar="N", help="Compilers at once (default: all cores).")
@click.option("--use-system", is_flag=True, help="Build nothing: say which programs are on PATH, and what they can.")
@click.option("--use-conda", is_flag=True, help="Install conda-forge's build instead of building.")
@click.option("--dry-run", is_flag=True, help="Show the commands, run none.")
@console_options
def command(
    folder: Path | None,
    ref: str | None,
    commit: str,
    source: Path | None,
    repository: str | None,
    cuda: bool,
    jobs: int | None,
    use_system: bool,
    use_conda: bool,
    dry_run: bool,
    console: Console,
) -> int:
    """Build llama-quantize and its sisters from a pinned, checked tag. Optional: no other command needs them."""
    from ollama_forge.jobs import llama_cpp_setup as setup

    if use_system or use_conda:
        if (use_system and use_conda) or folder or ref or source or commit or cuda or repository:
            raise UsageError(
                "--use-system and --use-conda build nothing, so that nothing else goes with them",
                next="Example: ollama-forge setup-llama-cpp --use-system",
            )
        return _use_system(console) if use_system else _use_conda(console, dry_run=dry_run)
    if source is not None and (ref or commit or repository):
        raise UsageError(
            "--source does not go together with --ref, --commit and --repository",
            why="The source folder is built as it is.",
            next="Leave one of them out.",
        )
    plan = setup.plan_setup(
        setup.SetupOptions(
            folder=(folder or setup.default_folder()).expanduser().absolute(),
            ref=ref or setup.PINNED_TAG,
            commit=commit.lower(),
            source=source.expanduser().absolute() if source else None,
            cuda=cuda,
            n_jobs=jobs or 0,
            repository=repository or setup.REPOSITORY,
        )
    )
    if dry_run:
        console.result({**plan.document(), "dry_run": True}, lambda: _show_plan(console, plan.lines()))
        return 0
    built = setup.run_setup(plan, console.say, _pass_on(console))

    def show() -> None:
        _show_tools(console, built.tools)
        console.line(f"To use them by name:  {built.path_line}")

    console.result(built.document(), show)
    return 0


def _show_plan(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.line(f"$ {line}")
    console.line("Nothing was run.")


def _show_tools(console: Console, tools: Sequence[NativeTool]) -> None:
    width = max((len(tool.name) for tool in tools), default=0)
    for tool in tools:
        console.line(f"{tool.name:<{width}}  {tool.words()}")


def _use_system(console: Console) -> int:
    from ollama_forge.jobs.native_tools import find_native_tools

    tools = find_native_tools()

    def show() -> None:
        _show_tools(console, tools)
        if not tools:
            console.line("None of llama.cpp's programs is on PATH. Build them: ollama-forge setup-llama-cpp")

    console.result({"tools": [tool.document() for tool in tools]}, show)
    return 0 if tools else 1


def _use_conda(console: Console, *, dry_run: bool) -> int:
    from ollama_forge.jobs import llama_cpp_setup as setup
    from ollama_forge.jobs.external_program import quoted

    argv = setup.plan_conda()
    if dry_run:
        document = {"commands": [list(argv)], "dry_run": True}
        console.result(document, lambda: _show_plan(console, [quoted(argv)]))
        return 0
    tools = setup.run_conda(argv, _pass_on(console))
    console.result({"tools": [tool.document() for tool in tools]}, lambda: _show_tools(console, tools))
    return 0


def _pass_on(console: Console) -> Output:
    def pass_on(text: bytes) -> None:
        if not console.is_quiet:
            sys.stderr.write(text.decode("utf-8", "replace"))
            sys.stderr.flush()

    return pass_on
