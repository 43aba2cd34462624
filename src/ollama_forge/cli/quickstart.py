"""`start` (also `quickstart`): a small current model, chosen for this machine, in Ollama."""

from __future__ import annotations

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.invoke import run_and_tell
from ollama_forge.cli.landing import HandedOn, handed_on_options

PROFILES = ("fast", "balanced", "quality", "low-vram")
TASKS = ("chat", "coding", "creative")


@click.command(
    "start",
    epilog="Examples: ollama-forge start   |   ollama-forge start --profile fast --task coding --name coder"
    "   (ollama-forge quickstart is the same)",
)
@click.option("--name", default="my-model", show_default=True, help="The Ollama model to make.")
@click.option("--profile", type=click.Choice(PROFILES), default="balanced", show_default=True)
@click.option("--task", type=click.Choice(TASKS), help="What it is for: another model, other parameters.")
@click.option("--repo-id", metavar="REPO", help="Take this repo of GGUFs instead of one of the table.")
@click.option("--quant", metavar="TYPE", help="Exactly this quantization (default: the profile's).")
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit (default: main).")
@click.option("--system", metavar="TEXT", help="System prompt (@FILE reads it from a file).")
@click.option("--temperature", metavar="X", help="Instead of the profile's.")
@click.option("--num-ctx", metavar="N", help="Instead of the profile's.")
@click.option("--top-p", metavar="X", help="Instead of the profile's.")
@click.option("--repeat-penalty", metavar="X", help="Instead of the profile's.")
@click.option("--non-interactive", is_flag=True, hidden=True)
@handed_on_options
def command(
    name: str,
    profile: str,
    task: str | None,
    repo_id: str | None,
    quant: str | None,
    revision: str | None,
    system: str | None,
    temperature: str | None,
    num_ctx: str | None,
    top_p: str | None,
    repeat_penalty: str | None,
    non_interactive: bool,
    landing: HandedOn,
    console: Console,
) -> None:
    """Get a small model that suits this machine's memory, verified, and ready to run.

    Profiles: fast (Q4_0, context 2048), balanced (Q4_K_M, 4096), quality (Q8_0, 8192), low-vram (Q4_0, 2048). Which
    model it is depends on the profile, the task and the memory; --dry-run says which, and why.
    """
    from ollama_forge.jobs.environment import total_memory_bytes
    from ollama_forge.jobs.starters import choose_start

    start = choose_start(profile, task, memory_bytes=total_memory_bytes(), repo=repo_id, quant=quant)
    typed = {"temperature": temperature, "num_ctx": num_ctx, "top_p": top_p, "repeat_penalty": repeat_penalty}
    parameters = {key: typed[key] or f"{value:g}" for key, value in start.parameters.items()}
    words = ["fetch", start.repo, "--name", name, "--quant", start.quant]
    words += ["--revision", revision] if revision else []
    words += ["--system", system] if system else []
    for key, text in parameters.items():
        words += [f"--{key.replace('_', '-')}", text]
    words += landing.words
    console.say(f"{start.repo} in {start.quant}: {start.why}")
    chosen = {"profile": profile, "task": task, "repo": start.repo, "parameters": parameters, "why": start.why}
    run_and_tell(console, words, {"start": chosen, "command": words})
    if not landing.is_dry_run:
        console.say(f'  ask it: ollama-forge run {name} "Why is the sky blue?"')
