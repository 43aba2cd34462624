"""`show`: what a model is, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.options import console_options, store_option

if TYPE_CHECKING:
    from ollama_forge.jobs.describe import ModelDescription

_TEMPLATE_LINES = 12


@click.command("show", epilog="Examples: ollama-forge show llama3.2   |   ollama-forge show ./model.gguf --json")
@click.argument("ref")
@click.option("--modelfile", "only_modelfile", is_flag=True, help="Print only the Modelfile.")
@click.option("--template", "only_template", is_flag=True, help="Print only the chat template, whole.")
@store_option
@console_options
def command(ref: str, only_modelfile: bool, only_template: bool, store_path: Path | None, console: Console) -> None:
    """What REF is: family, parameters, sizes, quantization mix, context, template, parameters, layers."""
    from ollama_forge.jobs.describe import describe
    from ollama_forge.jobs.resolve import resolve

    description = describe(resolve(ref, store_path))
    if only_modelfile and not console.as_json:
        console.line(str(description.document()["modelfile"] or f"FROM {description.path}"))
    elif only_template and not console.as_json:
        console.line(description.chat_template or description.modelfile.template or "")
    else:
        console.result(description.document(), lambda: _show(console, description))


def _show(console: Console, model: ModelDescription) -> None:
    facts = {
        "name": model.name,
        "family": model.family,
        "parameters": f"{human_count(model.parameters)} ({model.parameters:,})",
        "quantization": model.quantization,
        "size": human_bytes(model.size_bytes),
        **{key.replace("_", " "): str(value) for key, value in model.dimensions.items()},
        "tokenizer": " ".join(str(part) for part in model.tokenizer.values() if part),
        "path": model.path,
    }
    for block in (facts, model.origin):
        width = max(map(len, block), default=0)
        for key, value in block.items():
            console.line(f"{key:<{width}}  {value}")
    console.line()
    console.table(
        ("TYPE", "TENSORS", "SIZE", "BITS/WEIGHT"),
        [(x.type, str(x.tensors), human_bytes(x.size_bytes), f"{x.bits_per_weight:.2f}") for x in model.types],
        right=("TENSORS", "SIZE", "BITS/WEIGHT"),
    )
    if model.layers:
        console.line()
        rows = [(layer.kind, layer.digest[:19], human_bytes(layer.size_bytes)) for layer in model.layers]
        console.table(("LAYER", "DIGEST", "SIZE"), rows, right=("SIZE",))
    for title, text in (("system", model.modelfile.system), ("chat template", model.chat_template)):
        if text:
            _show_text(console, title, text)
    if model.modelfile.template:
        _show_text(console, "Ollama template", model.modelfile.template)
    for name, setting in model.modelfile.parameters:
        console.line(f"PARAMETER {name} {setting}")


def _show_text(console: Console, title: str, text: str) -> None:
    lines = text.splitlines()
    console.line()
    console.line(f"{title}:")
    for line in lines[:_TEMPLATE_LINES]:
        console.line("  " + line[:160])
    if len(lines) > _TEMPLATE_LINES:
        console.line(f"  ... {len(lines) - _TEMPLATE_LINES} more lines (show --template, show --json)")
