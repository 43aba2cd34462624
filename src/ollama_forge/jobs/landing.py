"""Whole jobs that end in an Ollama model: a GGUF landed, a folder imported, a base changed.

In: a path or an installed base, and a Modelfile's wishes. Out: `LandedModel`. The store's promises are `store.land`'s.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ollama_forge.files import Progress, atomic_output, no_progress, require_free_space
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.jobs.check import CheckReport, check_model
from ollama_forge.jobs.conversion import (
    ConvertOptions,
    PlannedGGUF,
    TypeShare,
    open_folder,
    open_joined,
    open_quantization,
)
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.lineage import Work, hashed_beside, record_landing, record_sent, served_ingredient, source_work
from ollama_forge.jobs.remote import land_remote
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.store.catalog import Store, open_store
from ollama_forge.store.discard import exists_error
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.land import Ingredients, Landed, ModelSource, land, plan_landing
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.name import parse_name, validate_writable

Planned = Callable[[], AbstractContextManager[PlannedGGUF]]


@dataclass(frozen=True)
class LandedModel:
    """A model in Ollama, or with `is_dry_run` what would be there.

    Attributes:
        written_bytes: disk that it takes.
        shared_bytes: bytes of it that were there already.
        types: the quantization mix, when the weights were made in this job.
    """

    name: str
    digest: str
    store: str
    written_bytes: int
    shared_bytes: int
    check: CheckReport | None
    replaced: bool
    warnings: tuple[str, ...]
    seconds: float
    types: tuple[TypeShare, ...] = ()
    is_dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form that every landing command promises."""
        return {
            "name": self.name,
            "digest": self.digest,
            "store": self.store,
            "written_bytes": self.written_bytes,
            "shared_bytes": self.shared_bytes,
            "check": self.check.document() if self.check else None,
            "replaced": self.replaced,
            "types": {share.type: share.tensors for share in self.types},
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def land_gguf(
    gguf_path: Path,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    *,
    adapters: Sequence[Path] = (),
    quantize: QuantizeOptions | None = None,
    projector: Path | None = None,
) -> LandedModel:
    """A GGUF file becomes an Ollama model; a split set is joined, and `quantize` makes it smaller on the way.

    Args:
        projector: the mmproj of a model that sees or hears; a server does not take it.

    Raises:
        NotFoundError, GGUFError: no such file, or not a GGUF.
        ExistsError: a model of that name is there and `overwrite` is false.
        CheckError: it does not run as it should; the store is as before.
    """
    validate_writable(parse_name(name))
    if quantize is not None:
        return _land_planned(
            lambda: open_quantization(gguf_path, quantize),
            name, changes, options, adapters,
            lambda: source_work(gguf_path, adapters, changes, quantize, projector=projector),
            projector,
        )  # fmt: skip
    with open_gguf(gguf_path) as gguf:
        is_split = len(gguf.paths) > 1
        size_bytes = gguf.size_bytes
    if is_split:
        return _land_planned(
            lambda: open_joined(gguf_path),
            name, changes, options, adapters,
            lambda: source_work(gguf_path, adapters, changes, projector=projector),
            projector,
        )  # fmt: skip
    return _land(gguf_path, name, changes, options, adapters, size_bytes, projector)


def import_folder(
    folder: Path,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    conversion: ConvertOptions,
    *,
    adapters: Sequence[Path] = (),
) -> LandedModel:
    """A Hugging Face folder becomes an Ollama model in one pass: converted, quantized and hashed as it is written."""
    validate_writable(parse_name(name))
    with contextlib.nullcontext(str) if options.dry_run else hashed_beside(folder) as digest:
        return _land_planned(
            lambda: open_folder(folder, conversion),
            name, changes, options, adapters,
            lambda: source_work(folder, adapters, changes, conversion, digest()),
        )  # fmt: skip


def land_installed(
    base: InstalledModel, name: str, changes: Modelfile, options: LandOptions, *, adapters: Sequence[Path] = ()
) -> LandedModel:
    """An Ollama model under another name with something changed; its blobs are shared."""
    return _land(base, name, changes, options, adapters, 0)


def land_named(
    base: str, name: str, changes: Modelfile, options: LandOptions, *, adapters: Sequence[Path] = ()
) -> LandedModel:
    """A model of `options.server` under another name with something changed; the server shares its own blobs."""
    work = source_work(None, adapters, changes)
    work = replace(work, ingredients=(served_ingredient(options.server, base), *work.ingredients))
    return _send(None, base, name, changes, options, adapters, time.monotonic(), lambda: work)


def land_planned(
    planned: Planned,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    *,
    adapters: Sequence[Path] = (),
    projector: Path | None = None,
) -> LandedModel:
    """A GGUF that is decided but not yet computed becomes an Ollama model, written once, straight into the store.

    Args:
        projector: the mmproj of a model that sees or hears; a server does not take it.
    """
    validate_writable(parse_name(name))
    return _land_planned(
        planned, name, changes, options, adapters, lambda: source_work(None, adapters, changes), projector
    )


def _land_planned(
    planned: Planned,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: Sequence[Path],
    work: Callable[[], Work],
    projector: Path | None = None,
) -> LandedModel:
    started = time.monotonic()
    if options.server is not None:
        return _send_planned(planned, name, changes, options, adapters, started, work)
    store = open_store(options.store_path)
    with planned() as gguf:
        if options.dry_run:
            return _planned_landing(store, name, gguf, options, started)
        with store.blobs.stage(gguf.size_bytes) as staged:
            with options.progress(f"Making {name}", gguf.size_bytes) as advance:
                write_gguf(staged, gguf.fields, gguf.entries, alignment=gguf.alignment, advance=advance)
            landed = _run_landing(store, staged, name, changes, options, adapters, 0, projector)
        return _result(landed, started, work(), gguf)


def _land(
    model: ModelSource,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: Sequence[Path],
    size_bytes: int,
    projector: Path | None = None,
) -> LandedModel:
    started = time.monotonic()
    source = model if isinstance(model, (Path, InstalledModel)) else None
    if options.server is not None:
        path = model if isinstance(model, Path) else None
        return _send(
            path, None, name, changes, options, adapters, started, lambda: source_work(source, adapters, changes)
        )
    store = open_store(options.store_path)
    if options.dry_run:
        plan = plan_landing(
            store, name, Ingredients(model, changes, tuple(adapters), projector), overwrite=options.overwrite
        )
        return LandedModel(
            name=plan.name.display,
            digest=plan.digest,
            store=str(store.models_dir),
            written_bytes=plan.written_bytes,
            shared_bytes=plan.shared_bytes,
            check=None,
            replaced=plan.replaces,
            warnings=(),
            seconds=time.monotonic() - started,
            is_dry_run=True,
        )
    landed = _run_landing(store, model, name, changes, options, adapters, size_bytes, projector)
    return _result(landed, started, source_work(source, adapters, changes, projector=projector))


def _run_landing(
    store: Store,
    model: ModelSource,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: Sequence[Path],
    size_bytes: int,
    projector: Path | None = None,
) -> Landed:
    check = partial(check_model, source=str(model)) if isinstance(model, Path) else check_model
    with _watched(options.progress, f"Hashing {name}", size_bytes) as advance:
        return land(
            store,
            name,
            model=model,
            modelfile=changes,
            adapters=adapters,
            projector=projector,
            overwrite=options.overwrite,
            check=check if options.check else None,
            advance=advance,
        )


@contextlib.contextmanager
def _watched(progress: Progress, label: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar where there is something to read; nothing for kilobytes."""
    with (progress if size_bytes else no_progress)(label, size_bytes) as advance:
        yield advance


def _planned_landing(store: Store, name: str, gguf: PlannedGGUF, options: LandOptions, started: float) -> LandedModel:
    """What landing a GGUF that does not exist yet would do; its digest is known only once it is computed."""
    wanted = store.canonical(name)
    replaces = store.read_manifest_bytes(wanted) is not None
    if replaces and not options.overwrite:
        raise exists_error(wanted)
    require_free_space(store.models_dir, gguf.size_bytes, wanted.display)
    return LandedModel(
        name=wanted.display,
        digest="",
        store=str(store.models_dir),
        written_bytes=gguf.size_bytes,
        shared_bytes=0,
        check=None,
        replaced=replaces,
        warnings=gguf.warnings,
        seconds=time.monotonic() - started,
        types=gguf.types,
        is_dry_run=True,
    )


def _result(landed: Landed, started: float, work: Work, gguf: PlannedGGUF | None = None) -> LandedModel:
    seconds = time.monotonic() - started
    unrecorded = record_landing(landed, work, seconds)
    return LandedModel(
        name=landed.name.display,
        digest=landed.digest,
        store=str(landed.store),
        written_bytes=landed.written_bytes,
        shared_bytes=landed.shared_bytes,
        check=landed.check if isinstance(landed.check, CheckReport) else None,
        replaced=landed.has_replaced,
        warnings=(*(gguf.warnings if gguf else ()), *landed.warnings, *unrecorded),
        seconds=seconds,
        types=gguf.types if gguf else (),
    )


def _send_planned(
    planned: Planned,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: Sequence[Path],
    started: float,
    work: Callable[[], Work],
) -> LandedModel:
    """A server takes whole files only, so the GGUF is made in a temporary folder first."""
    with planned() as gguf, scratch_folder() as scratch:
        path = scratch / "model.gguf"
        if not options.dry_run:
            with (
                atomic_output(path, expected_bytes=gguf.size_bytes) as sink,
                options.progress(f"Making {name}", gguf.size_bytes) as advance,
            ):
                write_gguf(sink, gguf.fields, gguf.entries, alignment=gguf.alignment, advance=advance)
        landed = _send(path, None, name, changes, options, adapters, started, work)
        return replace(landed, types=gguf.types, warnings=(*gguf.warnings, *landed.warnings))


def _send(
    path: Path | None,
    source: str | None,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: Sequence[Path],
    started: float,
    work: Callable[[], Work],
) -> LandedModel:
    server = options.server
    assert server is not None
    if options.dry_run:
        size_bytes = sum(p.stat().st_size for p in (path, *adapters) if p is not None and p.exists())
        wanted = parse_name(name).display
        return LandedModel(
            wanted, "", server.address.url, size_bytes, 0, None, server.has(name), (), time.monotonic() - started,
            is_dry_run=True,
        )  # fmt: skip
    landed = land_remote(
        server,
        name,
        changes,
        gguf_path=path,
        source=source,
        adapters=adapters,
        overwrite=options.overwrite,
        check=options.check,
        progress=options.progress,
    )
    seconds = time.monotonic() - started
    return LandedModel(
        name=landed.name,
        digest=landed.digest,
        store=landed.server,
        written_bytes=landed.sent_bytes,
        shared_bytes=landed.shared_bytes,
        check=landed.check,
        replaced=landed.replaced,
        warnings=record_sent(server, landed.name, landed.digest, work(), seconds),
        seconds=seconds,
    )
