"""`run`: one question, or a chat in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, store_option, typed_parameters
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.run import Chat


@click.command(
    "run",
    epilog='Examples: ollama-forge run llama3.2 "Why is the sky blue?"   |   ollama-forge run ./model.gguf',
)
@click.argument("ref")
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="System prompt instead of the model's own.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Any Modelfile parameter.")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path, exists=True), help="A LoRA GGUF.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--server", "use_server", is_flag=True, help="Ask a running Ollama (OLLAMA_HOST) instead of the engine.")
@store_option
@console_options
def command(
    ref: str,
    prompt: str | None,
    system: str | None,
    params: tuple[str, ...],
    adapters: tuple[Path, ...],
    raw: bool,
    use_server: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Ask REF something. Without PROMPT: a chat (or the prompt comes from a pipe)."""
    parameters = dict(typed_parameters(params, {}))
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt:
        raise UsageError("The prompt is empty", next=f'Example: ollama-forge run {ref} "Why is the sky blue?"')
    if prompt is None and console.as_json:
        raise UsageError("--json needs a PROMPT", next=f'Example: ollama-forge run {ref} "Hello" --json')
    with _open(ref, parameters, system, adapters, raw, use_server, store_path, console) as chat:
        if prompt is None:
            _talk(chat, console)
            return
        live = not console.as_json
        answer = chat.ask(prompt, (lambda text: click.echo(text, nl=False)) if live else None)
        console.result(answer.document(), lambda: console.line())
        if answer.stop_reason == "length":
            console.warn("The answer was cut: raise --param num_predict=N or --param num_ctx=N.")


@contextlib.contextmanager
def _open(
    ref: str,
    parameters: dict[str, Any],
    system: str | None,
    adapters: tuple[Path, ...],
    raw: bool,
    use_server: bool,
    store_path: Path | None,
    console: Console,
) -> Iterator[Chat]:
    if use_server:
        from ollama_forge.jobs.run import ServerChat
        from ollama_forge.store.modelfile import Message
        from ollama_forge.store.server import OllamaServer

        if adapters or raw:
            raise UsageError("--adapter and --raw belong to the embedded engine", next="Leave --server out.")
        yield ServerChat(OllamaServer(), ref, parameters, [Message("system", system)] if system else [])
        return
    from ollama_forge.jobs.resolve import resolve, resolve_gguf
    from ollama_forge.jobs.run import open_chat

    model = resolve(ref, store_path)
    if model.gguf_path is None:
        resolve_gguf(ref, store_path)
    with open_chat(model, parameters=parameters, system=system, adapters=adapters, raw=raw) as chat:
        if chat.is_plain and not raw:
            console.warn("This model has no Jinja chat template; the prompt goes in as it is (as with --raw).")
        yield chat


def _talk(chat: Chat, console: Console) -> None:
    console.say("Type your question; /bye or Ctrl-D ends the chat.")
    while True:
        try:
            prompt = click.prompt(">>>", prompt_suffix=" ", err=True).strip()
        except click.Abort:
            console.say("")
            return
        if prompt in ("/bye", "/exit", "/quit"):
            return
        chat.ask(prompt, lambda text: click.echo(text, nl=False))
        console.line()
