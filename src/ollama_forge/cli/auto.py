"""`auto`: whatever SOURCE is, the right command for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.invoke import run_and_tell
from ollama_forge.cli.landing import HandedOn, handed_on_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.recipe.identify import Identified


@click.command(
    "auto",
    epilog="Examples: ollama-forge auto ./model.gguf --name mine   |   ollama-forge auto Qwen/Qwen3-0.6B-GGUF",
)
@click.argument("source")
@click.option("--name", help="The Ollama model to make (default: after SOURCE).")
@click.option("--base", metavar="REF", help="For an adapter: the model that it goes on.")
@click.option("--adapter", "adapters", multiple=True, help="An adapter to put on top of SOURCE.")
@click.option("--gguf-file", metavar="PATH", help="Of a repo of GGUFs: exactly this file.")
@click.option("--quant", "--quantize", "quant", metavar="TYPE", help="Which file of a repo; or what to make of SOURCE.")
@click.option("--revision", metavar="REV", help="Of a repo: a branch, a tag or a commit (default: main).")
@click.option("--merge", is_flag=True, help="Merge an adapter into the weights instead of adding a layer.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Of a recipe: a variable.")
@click.option("--output", "--output-dir", "output", type=click.Path(path_type=Path), help="Keep the GGUF there, too.")
@click.option("--system", metavar="TEXT", help="System prompt (@FILE reads it from a file).")
@click.option("--temperature", metavar="X", help="A parameter of the model.")
@click.option("--num-ctx", metavar="N", help="A parameter of the model.")
@click.option("--top-p", metavar="X", help="A parameter of the model.")
@click.option("--repeat-penalty", metavar="X", help="A parameter of the model.")
@click.option("--no-prompt", is_flag=True, hidden=True)
@handed_on_options
def command(
    source: str,
    no_prompt: bool,
    landing: HandedOn,
    console: Console,
    **wishes: Any,
) -> None:
    """Look at SOURCE, say what it is, and do the right thing with it.

    SOURCE may be a recipe, a GGUF file, a Hugging Face folder or repo (GGUF or safetensors), a model of Ollama, or an
    adapter (with --base).
    """
    from ollama_forge.recipe.identify import identify

    found = identify(source, landing.store_path, revision=wishes["revision"] or "")
    console.say(f"{source} is {found.said}.")
    words = _words_for(found, wishes)
    words += landing.words
    extra = {"source": source, "kind": found.kind.value, "evidence": found.said, "command": words}
    run_and_tell(console, words, extra)


def _words_for(found: Identified, wishes: dict[str, Any]) -> list[str]:
    """The command for a source, as words; every wish is in it, or is refused."""
    from ollama_forge.recipe.identify import Kind

    words, takes = _ROUTES[found.kind.value](found, wishes)
    taken = {*takes, "revision"} if found.kind in (Kind.HUB_GGUF, Kind.HUB_SAFETENSORS, Kind.HUB_ADAPTER) else takes
    for key in _FLAGS:
        if wishes[key] and key not in taken:
            raise UsageError(
                f"--{key.replace('_', '-').rstrip('s')} does not go with {found.said}", next="Leave it out."
            )
    if found.kind is not Kind.RECIPE:
        for key in _TEXTS:
            words += [f"--{key.replace('_', '-')}", wishes[key]] if wishes[key] is not None else []
    elif any(wishes[key] is not None for key in _TEXTS):
        raise UsageError("A recipe says itself what its model says", next="Change the recipe, or use --set NAME=VALUE.")
    return words


_TEXTS = ("system", "temperature", "num_ctx", "top_p", "repeat_penalty")
_FLAGS = ("name", "base", "adapters", "gguf_file", "quant", "revision", "merge", "settings", "output")
_Routed = tuple[list[str], set[str]]


def _recipe(found: Identified, wishes: dict[str, Any]) -> _Routed:
    words = ["build", found.ref]
    for setting in wishes["settings"]:
        words += ["--set", setting]
    return words, {"settings"}


def _gguf(found: Identified, wishes: dict[str, Any]) -> _Routed:
    from ollama_forge.jobs.hub import default_name

    name = wishes["name"] or default_name(Path(found.ref).stem)
    words = ["convert", "--gguf", found.ref, "--name", name]
    words += ["--quantize", wishes["quant"]] if wishes["quant"] else []
    return words + _adapters(wishes), {"name", "quant", "adapters"}


def _folder(found: Identified, wishes: dict[str, Any]) -> _Routed:
    from ollama_forge.jobs.hub import default_name

    name = wishes["name"] or default_name(Path(found.ref).resolve().name)
    return _import(found.ref, name, wishes), {"name", "quant", "output"}


def _import(ref: str, name: str, wishes: dict[str, Any]) -> list[str]:
    words = ["import", ref, "--name", name]
    words += ["--quant", wishes["quant"]] if wishes["quant"] else []
    return words + (["--output-dir", str(wishes["output"])] if wishes["output"] else [])


def _ollama(found: Identified, wishes: dict[str, Any]) -> _Routed:
    if not wishes["name"]:
        raise UsageError(
            f"{found.ref!r} is {found.said}: it is there already",
            why="Another model made of it needs a name of its own.",
            next=f'Ask it: ollama-forge run {found.ref}; or: ollama-forge auto {found.ref} --name NAME --system "..."',
        )
    words = ["create-from-base", "--base", found.ref, "--name", wishes["name"]]
    return words + _adapters(wishes), {"name", "adapters"}


def _adapter(found: Identified, wishes: dict[str, Any]) -> _Routed:
    base, name = _base_and_name(found, wishes)
    words = ["retrain", "--base", base, "--adapter", found.ref, "--name", name]
    return words + (["--merge"] if wishes["merge"] else []) + _adapters(wishes), {"name", "base", "merge", "adapters"}


def _hub_gguf(found: Identified, wishes: dict[str, Any]) -> _Routed:
    from ollama_forge.jobs.hub import default_name

    assert found.repo is not None
    words = ["fetch", found.ref, "--name", wishes["name"] or default_name(found.ref), "--revision", found.repo.revision]
    quant, file = wishes["quant"] or found.repo.quant, wishes["gguf_file"] or found.repo.file
    words += ["--quant", quant] if quant else []
    words += ["--gguf-file", file] if file else []
    return words, {"name", "quant", "gguf_file"}


def _hub_safetensors(found: Identified, wishes: dict[str, Any]) -> _Routed:
    from ollama_forge.jobs.hub import default_name

    assert found.repo is not None
    words = _import(found.ref, wishes["name"] or default_name(found.ref), wishes)
    return [*words, "--revision", found.repo.revision], {"name", "quant", "output"}


def _hub_adapter(found: Identified, wishes: dict[str, Any]) -> _Routed:
    assert found.repo is not None
    base, name = _base_and_name(found, wishes)
    words = ["fetch-adapter", found.ref, "--base", base, "--name", name, "--revision", found.repo.revision]
    return words + (["--merge"] if wishes["merge"] else []), {"name", "base", "merge"}


def _base_and_name(found: Identified, wishes: dict[str, Any]) -> tuple[str, str]:
    from ollama_forge.jobs.hub import default_name

    if not wishes["base"]:
        raise UsageError(
            f"{found.ref!r} is {found.said}, and needs the model that it goes on",
            why=f"It says that it was trained on {found.base!r}." if found.base else "",
            next=f"ollama-forge auto {found.ref} --base MODEL",
        )
    return wishes["base"], wishes["name"] or default_name(Path(found.ref.rstrip("/")).stem)


def _adapters(wishes: dict[str, Any]) -> list[str]:
    return [word for path in wishes["adapters"] for word in ("--adapter", path)]


_ROUTES = {
    "recipe": _recipe,
    "gguf": _gguf,
    "folder": _folder,
    "adapter": _adapter,
    "ollama": _ollama,
    "hub gguf": _hub_gguf,
    "hub safetensors": _hub_safetensors,
    "hub adapter": _hub_adapter,
}
