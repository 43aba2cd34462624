"""Make a model from one that is there: a base plus what a Modelfile or the options ask for.

In: what was typed. Out: `LandedModel`; the base's blobs are shared, so only kilobytes are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ollama_forge.errors import ModelfileError, UsageError
from ollama_forge.jobs.adapters import prepare_adapter
from ollama_forge.jobs.conversion import ConvertOptions
from ollama_forge.jobs.landing import (
    LandedModel,
    LandOptions,
    import_folder,
    land_gguf,
    land_installed,
    land_named,
)
from ollama_forge.jobs.lineage import standing_for
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.source.ref import RefKind, looks_like_path, parse_ref
from ollama_forge.store.catalog import open_store
from ollama_forge.store.modelfile import Modelfile, read_modelfile
from ollama_forge.store.parameters import merge_parameters


@dataclass(frozen=True)
class Creation:
    """What to make: a base, what is different, and adapters on top."""

    base: str
    changes: Modelfile
    adapters: tuple[Path, ...] = ()


def read_creation(modelfile_path: Path) -> Creation:
    """What a Modelfile asks for; its relative paths are meant from its own folder, as Ollama means them.

    Raises:
        ModelfileError: it does not parse, or has several FROM lines, which this tool cannot join.
    """
    modelfile = read_modelfile(modelfile_path)
    if len(modelfile.sources) != 1:
        raise ModelfileError(
            f"{str(modelfile_path)!r} has {len(modelfile.sources)} FROM lines",
            why="A model is made from one base.",
            next="Keep one FROM line.",
        )
    folder = modelfile_path.parent
    beside = folder / Path(modelfile.sources[0]).expanduser()
    base = str(beside) if looks_like_path(modelfile.sources[0]) or beside.exists() else modelfile.sources[0]
    adapters = tuple(folder / Path(adapter).expanduser() for adapter in modelfile.adapters)
    return Creation(base, replace(modelfile, sources=(), adapters=()), adapters)


def override(creation: Creation, changes: Modelfile, adapters: Sequence[Path] = ()) -> Creation:
    """A Modelfile's wishes with the command line's on top: texts replace, parameters merge, the rest is added."""
    old = creation.changes
    merged = Modelfile(
        template=changes.template if changes.template is not None else old.template,
        system=changes.system if changes.system is not None else old.system,
        licenses=(*old.licenses, *changes.licenses),
        parameters=merge_parameters(old.parameters, changes.parameters),
        messages=(*old.messages, *changes.messages),
        renderer=changes.renderer or old.renderer,
        parser=changes.parser or old.parser,
        requires=changes.requires or old.requires,
        warnings=old.warnings,
    )
    return Creation(creation.base, merged, (*creation.adapters, *adapters))


def take_template(creation: Creation, source: str, store_path: Path | None) -> Creation:
    """`creation` with the Ollama template of another model (`--template-from`).

    Raises:
        UsageError: that model has none of its own.
    """
    template = resolve(source, store_path).modelfile.template
    if template is None:
        raise UsageError(
            f"{source!r} has no Ollama template to take",
            why="Its chat template is in the GGUF itself, and stays with it.",
            next=f"Look at it: ollama-forge show {source} --template",
        )
    return replace(creation, changes=replace(creation.changes, template=template))


def create_model(creation: Creation, name: str, options: LandOptions) -> LandedModel:
    """A new model from a base: an Ollama model whose blobs are shared, a GGUF file, or a folder.

    Raises:
        UsageError: the base is the model itself and `overwrite` was not asked for.
        UnsupportedError: adapters for a folder.
    """
    if options.server is not None and parse_ref(creation.base).kind is RefKind.OLLAMA:
        return land_named(creation.base, name, creation.changes, options, adapters=creation.adapters)
    model = resolve(creation.base, options.store_path)
    if creation.adapters:
        with scratch_folder() as scratch:
            adapters = tuple(prepare_adapter(path, model, scratch) for path in creation.adapters)
            with standing_for(dict(zip(adapters, creation.adapters, strict=True))):
                return _create(model, replace(creation, adapters=adapters), name, options)
    return _create(model, creation, name, options)


def _create(model: ResolvedModel, creation: Creation, name: str, options: LandOptions) -> LandedModel:
    if model.folder is not None:
        return import_folder(
            model.folder, name, creation.changes, options, ConvertOptions(), adapters=creation.adapters
        )
    if model.installed is None:
        assert model.gguf_path is not None
        return land_gguf(model.gguf_path, name, creation.changes, options, adapters=creation.adapters)
    if open_store(options.store_path).canonical(name) == model.installed.name and not options.overwrite:
        raise UsageError(
            f"{name!r} is the base itself",
            next="Choose another --name, or add --force to change the model in place.",
        )
    return land_installed(model.installed, name, creation.changes, options, adapters=creation.adapters)
