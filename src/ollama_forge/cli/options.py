"""Options that several commands share, so that one word means one thing everywhere.

Each is a decorator; `modelfile_options` hands the command one `changes` value instead of a dozen arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.errors import ModelfileError, UsageError

Command = Callable[..., Any]

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


class FiniteRange(click.FloatRange):
    """A number within bounds, or any number; never NaN, which no bound stops, nor infinity."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()


def console_options(function: Command) -> Command:
    """`--json` and `-q/--quiet`; the command receives `console`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Only the result and warnings.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        from ollama_forge.source.hub import watched_by

        console = Console(as_json=as_json, is_quiet=quiet)
        with watched_by(console.progress):
            return function(*args, console=console, **kwargs)

    return wrapper


def store_option(function: Command) -> Command:
    """`--store DIR`: another Ollama models folder than OLLAMA_MODELS or the default one."""
    return click.option(
        "--store",
        "store_path",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Ollama's models folder (default: OLLAMA_MODELS, or where Ollama keeps it).",
    )(function)


def write_options(function: Command) -> Command:
    """`--force` and `--dry-run`, for everything that writes."""
    function = click.option("--dry-run", is_flag=True, help="Say what would be done, exactly; change nothing.")(
        function
    )
    return click.option("--force", is_flag=True, help="Replace what is already there under that name.")(function)


def threads_option(function: Command) -> Command:
    """`--threads N`."""
    return click.option(
        "--threads", "n_threads", type=click.IntRange(1, 512), metavar="N", help="Processor threads (default: all)."
    )(function)


_EXAMPLES = {"--param": "temperature=0.7", "--message": "user='Hello!'", "--set": "base=llama3.2"}


def parse_assignments(values: tuple[str, ...], option: str) -> tuple[tuple[str, str], ...]:
    """`("a=1", "b=x=y")` -> `(("a", "1"), ("b", "x=y"))`.

    Raises:
        UsageError: an item without `=` or without a name.
    """
    pairs = []
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"{option} {value!r} is not name=value", next=f"Example: {option} {_EXAMPLES[option]}")
        pairs.append((name.strip(), text))
    return tuple(pairs)


def modelfile_options(function: Command) -> Command:
    """Everything that a Modelfile can say, as options; the command receives `changes`, a `Modelfile` without FROM."""
    declared = [
        click.option("--system", metavar="TEXT", help="System prompt (@FILE reads it from a file)."),
        click.option("--template", metavar="TEXT", help="Go template (@FILE reads it from a file). Seldom needed."),
        click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Any Modelfile parameter."),
        click.option("--temperature", metavar="X", help="Same as --param temperature=X."),
        click.option("--num-ctx", metavar="N", help="Context length in tokens: --param num_ctx=N."),
        click.option("--top-p", metavar="X", help="Same as --param top_p=X."),
        click.option("--repeat-penalty", metavar="X", help="Same as --param repeat_penalty=X."),
        click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Stop string; may be repeated."),
        click.option(
            "--message", "messages", multiple=True, metavar="ROLE=TEXT", help="An example turn to begin with."
        ),
        click.option("--license", "licenses", multiple=True, metavar="TEXT", help="Licence text (@FILE reads a file)."),
        click.option("--renderer", metavar="NAME", help="Ollama's built-in renderer, where a family needs one."),
        click.option("--parser", metavar="NAME", help="Ollama's built-in parser, where a family needs one."),
        click.option("--requires", metavar="VERSION", help="Oldest Ollama version that can run the model."),
    ]

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        system: str | None,
        template: str | None,
        params: tuple[str, ...],
        temperature: str | None,
        num_ctx: str | None,
        top_p: str | None,
        repeat_penalty: str | None,
        stops: tuple[str, ...],
        messages: tuple[str, ...],
        licenses: tuple[str, ...],
        renderer: str | None,
        parser: str | None,
        requires: str | None,
        **kwargs: Any,
    ) -> Any:
        from ollama_forge.store.modelfile import Message, Modelfile

        named = {"temperature": temperature, "num_ctx": num_ctx, "top_p": top_p, "repeat_penalty": repeat_penalty}
        changes = Modelfile(
            system=_text_or_file(system, "--system"),
            template=_go_template(template),
            parameters=typed_parameters(params, named, stops),
            messages=tuple(Message(*pair) for pair in parse_assignments(messages, "--message")),
            licenses=tuple(text for text in (_text_or_file(item, "--license") for item in licenses) if text),
            renderer=renderer,
            parser=parser,
            requires=requires,
        )
        for message in changes.messages:
            if message.role not in ("system", "user", "assistant"):
                raise UsageError(
                    f"--message has the role {message.role!r}",
                    why="A turn is spoken by system, user or assistant.",
                    next="Example: --message 'user=Hello' --message 'assistant=Hi!'",
                )
        return function(*args, changes=changes, **kwargs)

    for option in reversed(declared):
        option(wrapper)
    return wrapper


def typed_parameters(
    params: tuple[str, ...], named: dict[str, str | None], stops: tuple[str, ...] = ()
) -> tuple[tuple[str, Any], ...]:
    """Parameters as typed on the command line, with Ollama's own types; a later one wins, `stop` accumulates.

    Raises:
        UsageError: an unknown name, or a value of the wrong type.
    """
    from ollama_forge.store.parameters import merge_parameters, parse_parameter

    pairs = [(name, text) for name, text in named.items() if text is not None]
    pairs += parse_assignments(params, "--param")
    stop_texts = [*stops, *(text for name, text in pairs if name == "stop")]
    try:
        typed = [(name, parse_parameter(name, text)) for name, text in pairs if name != "stop"]
    except ModelfileError as exc:
        raise UsageError(exc.what, why=exc.why, next=exc.next) from exc
    if stop_texts:
        typed.append(("stop", tuple(stop_texts)))
    return merge_parameters((), typed)


def _go_template(value: str | None) -> str | None:
    """Ollama itself would find out only when the model is run."""
    text = _text_or_file(value, "--template")
    if text is not None and text.rfind("{{") > text.rfind("}}"):
        raise UsageError(
            f"--template opens {text[text.rfind('{{') :][:40]!r} and never closes it",
            why="It is a Go template: what begins with {{ ends with }}.",
            next="Mend it, or leave it out: the GGUF's own template is used.",
        )
    return text


def _text_or_file(value: str | None, option: str) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"{option} could not read {str(path)!r}: {getattr(exc, 'strerror', None) or exc}",
            why="A value that begins with @ names a text file in UTF-8.",
            next="Check the path, or give the text itself.",
        ) from exc
