"""`train`: the same as `finetune`; with `--write-script` the same as a bash script that a person can read."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ollama_forge.cli import finetune, retrain
from ollama_forge.cli.console import Console
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.train_script import ScriptRequest

_IN_VARIABLES = {
    *("data", "more_data", "include", "base", "name", "workdir", "trainer_name", "base_gguf", "run_trainer"),
    *("prepared_output", "adapter_output", "format_name", "skip_retrain", "resume", "write_script"),
}
_NOT_IN_SCRIPTS = {"as_json", "quiet", "dry_run", "force", "config"}
_FINETUNE_FLAGS = {
    "rank": "--lora-r",
    "alpha": "--lora-alpha",
    "lr": "--adam-alpha",
    "max_steps": "--adam-iter",
    "epochs": "--epochs",
    "max_length": "--ctx",
    "batch_size": "--batch",
    "grad_accum": "--grad-acc",
    "seed": "--seed",
}
_WHOLE_NUMBERS = ("alpha", "epochs")


def _with_script_option(function: Any) -> Any:
    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, write_script: Path | None, **kwargs: Any) -> Any:
        if write_script is not None:
            return _write_script(ctx, write_script, kwargs)
        return function(**kwargs)

    return wrapper


def _write_script(ctx: click.Context, path: Path, values: dict[str, Any]) -> None:
    from ollama_forge.files import refuse_existing, write_bytes
    from ollama_forge.jobs.train_script import render_script

    console = Console(as_json=values["as_json"], is_quiet=values["quiet"])
    text = render_script(_request(ctx, values))
    refuse_existing(path, overwrite=values["force"])
    content = text.encode("utf-8", "surrogateescape")
    if not values["dry_run"]:
        write_bytes(path, content, overwrite=values["force"], mode=0o755)
    document = {"script": str(path), "bytes": len(content), "dry_run": values["dry_run"], "text": text}

    def show() -> None:
        if values["dry_run"]:
            console.line(text.rstrip("\n"))
            return
        console.line(f"Wrote {path}. Next: bash {_quoted(path)}")

    console.result(document, show)


def _request(ctx: click.Context, values: dict[str, Any]) -> ScriptRequest:
    from ollama_forge.jobs.train_script import ScriptRequest
    from ollama_forge.jobs.trainer_job import TrainerOptions
    from ollama_forge.jobs.trainers import ADAPTER_NAME, PREPARED_NAME, choose_trainer, refuse_source, require_format

    data = (*values["data"], *values["more_data"])
    if not data or values["base"] is None or (values["name"] is None and not values["skip_retrain"]):
        raise UsageError(
            "train needs --data, --base and --name",
            next="Example: ollama-forge train --data ./data --base llama3.2 --name my-model --write-script train.sh",
        )
    trainer = TrainerOptions(
        "builtin" if values["trainer_name"] == "auto" and not values["run_trainer"] else values["trainer_name"],
        base_gguf=values["base_gguf"],
        format=values["format_name"],
        run_trainer=values["run_trainer"],
    )
    chosen = choose_trainer(trainer)
    if chosen == "llama.cpp" and trainer.base_gguf is None:
        raise UsageError(
            "A script for llama.cpp's finetune needs --base-gguf",
            why="That program trains on a GGUF file.",
            next="Name one, or leave --trainer out: the built-in trainer finds the base's own file.",
        )
    name = None if values["skip_retrain"] else values["name"]
    if name is not None:
        from ollama_forge.store.name import parse_name, validate_writable

        validate_writable(parse_name(name))
    form = require_format(chosen, trainer)
    workdir = values["workdir"] or finetune.default_folder(values["name"])
    landing = {option.name for option in retrain.command.params} - _IN_VARIABLES - _NOT_IN_SCRIPTS
    training = {option.name for option in finetune.command.params} - landing - _IN_VARIABLES - _NOT_IN_SCRIPTS
    prepared = values["prepared_output"] or (Path(PREPARED_NAME) if form == "llama.cpp" else workdir / "train.jsonl")
    refuse_source(prepared, data)
    return ScriptRequest(
        data=data,
        base=values["base"],
        name=name,
        base_gguf=trainer.base_gguf,
        prepared=prepared,
        format=form,
        adapter_dir=values["adapter_output"] or Path(ADAPTER_NAME),
        workdir=workdir,
        trainer=chosen,
        include=values["include"],
        train_words=_words(ctx, [*training, "store_path"]),
        finetune_words=_finetune_words(ctx) if chosen == "llama.cpp" else (),
        retrain_words=_words(ctx, landing),
    )


def _words(ctx: click.Context, names: Iterable[str | None]) -> tuple[str, ...]:
    """The options of those names that were given, as they may be typed again."""
    words: list[str] = []
    wanted = set(names)
    for option in ctx.command.params:
        if not isinstance(option, click.Option) or option.name not in wanted or not _is_given(ctx, option.name):
            continue
        value = ctx.params[option.name]
        if option.is_flag:
            flags = option.opts if value else option.secondary_opts
            words += flags[:1]
            continue
        for item in value if option.multiple else (value,):
            words += [option.opts[0], str(item)]
    return tuple(words)


def _finetune_words(ctx: click.Context) -> tuple[str, ...]:
    words: list[str] = []
    for name, flag in _FINETUNE_FLAGS.items():
        if _is_given(ctx, name):
            value = ctx.params[name]
            words += [flag, str(max(1, round(value)) if name in _WHOLE_NUMBERS else value)]
    return tuple(words)


def _is_given(ctx: click.Context, name: str | None) -> bool:
    return name is not None and ctx.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


command = click.Command(
    "train",
    callback=_with_script_option(finetune.command.callback),
    params=[
        *finetune.command.params,
        click.Option(
            ["--write-script"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Train nothing now; write a bash script that checks, prepares, trains and lands.",
        ),
    ],
    help="Fine-tune the model that Ollama runs (the same as finetune), or write that as a bash script.",
    epilog="Example: ollama-forge train --data ./data --base llama3.2 --name my-model --write-script train.sh",
)
