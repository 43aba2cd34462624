"""Merging as a whole job: a base and adapters become one model, as a GGUF file, a folder, or a model in Ollama.

In: a base on this disk (adapter layers that it has already are merged too) and adapters with weights. Out:
`MergedModel`, which says for each edited tensor what storing it cost. All other tensors are copied byte for byte.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.errors import AdapterError, ExistsError, UsageError
from ollama_forge.files import Progress, no_progress, refuse_existing, require_free_space
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.jobs.adapters import base_path, prepare_adapter, settle_base_copies
from ollama_forge.jobs.conversion import ConvertOptions, PlannedGGUF, write_planned
from ollama_forge.jobs.creation import Creation, create_model, override
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder, land_planned
from ollama_forge.jobs.lineage import file_ingredient, ingredient_of, modelfile_text, standing_for, working
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.transform.apply import Addition, EditedGGUF, plan_gguf_edit
from ollama_forge.transform.edits import TensorLoss
from ollama_forge.transform.folder import write_edited_folder
from ollama_forge.transform.lora import WeightedAdapter, plan_merge
from ollama_forge.transform.places import FolderLocator, GGUFLocator
from ollama_forge.weights.adapter import open_adapter
from ollama_forge.weights.adapter_base import HEAD, LoraBase, describe_base, describe_gguf
from ollama_forge.weights.adapter_fit import FittedAdapter, fit_adapter
from ollama_forge.weights.checkpoint import open_checkpoint

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class MergeInput:
    """An adapter as typed, and how strongly it is wanted."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        untie: give a base whose embedding is its output head too a head of its own, where an adapter needs it.
        imatrix: importance matrix for the tensors that are quantized again.
    """

    untie: bool = False
    imatrix: Path | None = None
    n_threads: int | None = None


@dataclass(frozen=True)
class MergedModel:
    """A merged model, or with `is_dry_run` what would be written.

    Attributes:
        output: the file or folder; None when it was landed only.
        losses: for each edited tensor, what storing it cost; empty in a dry run.
        edited, untouched: numbers of tensors.
    """

    output: Path | None
    size_bytes: int
    sha256: str
    losses: tuple[TensorLoss, ...]
    edited: int
    untouched: int
    seconds: float
    warnings: tuple[str, ...] = ()
    is_dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output) if self.output else None,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "edited": self.edited,
            "untouched": self.untouched,
            "tensors": [loss.document() for loss in self.losses],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


@dataclass(frozen=True, eq=False)
class _OpenMerge:
    """A merge that is decided; its files stay open."""

    plan: EditedGGUF
    gguf: PlannedGGUF

    def result(self, output: Path | None, started: float, **more: Any) -> MergedModel:
        return MergedModel(
            output=output,
            size_bytes=self.gguf.size_bytes,
            losses=tuple(self.plan.losses),
            edited=len(self.plan.edited),
            untouched=len(self.plan.entries) - len(self.plan.edited),
            seconds=time.monotonic() - started,
            warnings=(*self.gguf.warnings, *_weak_edits(self.plan.losses)),
            **more,
        )


def merge_model(
    base: ResolvedModel,
    inputs: Sequence[MergeInput],
    output: Path,
    options: MergeOptions | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> MergedModel:
    """Write the merged model: a GGUF file from a GGUF base, a folder from a Hugging Face folder.

    Raises:
        AdapterError: an adapter does not fit, or cannot be merged exactly; its tensor is named, and nothing is written.
        UsageError: an option that does not go with the base.
        ExistsError: the output is there and `overwrite` is false, or it is the base itself.
    """
    started = time.monotonic()
    options = options or MergeOptions()
    if output.exists() and output.samefile(base_path(base)):
        raise ExistsError(
            f"{str(output)!r} is the base itself",
            why="A model is never merged in place: the base would be lost.",
            next="Choose another name for -o.",
        )
    if base.folder is not None:
        return _merge_folder(base, inputs, output, options, started, overwrite, dry_run, progress)
    if output.suffix.lower() != ".gguf":
        raise UsageError(
            f"{str(output)!r} does not end with .gguf",
            why="The base is a GGUF file, and so is the result.",
            next=f"Name it: -o {output}.gguf",
        )
    refuse_existing(output, overwrite=overwrite)
    with _open_merge(base, inputs, options) as merge:
        written = write_planned(merge.gguf, output, started, overwrite=overwrite, dry_run=dry_run, progress=progress)
        return merge.result(output, started, sha256=written.sha256, is_dry_run=dry_run)


def merge_and_land(
    base: ResolvedModel,
    inputs: Sequence[MergeInput],
    name: str,
    changes: Modelfile,
    land_options: LandOptions,
    options: MergeOptions | None = None,
) -> tuple[MergedModel, LandedModel]:
    """The merged model becomes an Ollama model; what else the base says (system prompt, parameters) stays.

    Raises:
        AdapterError: an adapter does not fit, or cannot be merged exactly; nothing is landed.
        As `jobs.landing` says.
    """
    started = time.monotonic()
    options = options or MergeOptions()
    wanted = inherited(base, changes)
    if base.folder is not None:
        with scratch_folder() as scratch:
            merged = merge_model(
                base, inputs, scratch / "merged", options, dry_run=land_options.dry_run,
                progress=land_options.progress,
            )  # fmt: skip
            folder = base.folder if land_options.dry_run else scratch / "merged"
            with _merging(base, inputs, options, changes):
                landed = import_folder(folder, name, wanted, land_options, ConvertOptions(n_threads=options.n_threads))
            return replace(merged, output=None), landed
    with _open_merge(base, inputs, options) as merge, _merging(base, inputs, options, changes):
        landed = land_planned(
            lambda: contextlib.nullcontext(merge.gguf), name, wanted, land_options, projector=base.projector
        )
        return merge.result(None, started, sha256="", is_dry_run=land_options.dry_run), landed


def _merging(
    base: ResolvedModel, inputs: Sequence[MergeInput], options: MergeOptions, changes: Modelfile
) -> contextlib.AbstractContextManager[None]:
    """What the registry is told of a merge; enough to do it again."""
    sources = [ingredient_of(base), *(file_ingredient(item.path, "adapter") for item in inputs)]
    if options.imatrix is not None:
        sources.append(file_ingredient(options.imatrix, "imatrix"))
    return working(
        "merge",
        sources,
        weights=[item.weight for item in inputs],
        untie=options.untie,
        modelfile=modelfile_text(changes),
    )


def inherited(base: ResolvedModel, changes: Modelfile) -> Modelfile:
    """What an Ollama model says beside its weights, with the command line's wishes on top."""
    own = replace(base.modelfile, sources=(), adapters=(), drafts=())
    return override(Creation(base.text, own), changes).changes


def retrain(base: str, adapters: Sequence[Path], name: str, changes: Modelfile, options: LandOptions) -> LandedModel:
    """Land a base with adapter layers on top, each converted to GGUF where it is something else.

    Raises:
        AdapterError: one does not fit, or only a merge could express it; nothing is landed.
        As `jobs.landing` says.
    """
    model = resolve(base, options.store_path)
    with scratch_folder() as scratch:
        files = tuple(prepare_adapter(path, model, scratch) for path in adapters)
        with standing_for(dict(zip(files, adapters, strict=True))):
            return create_model(Creation(base, changes, files), name, options)


@contextlib.contextmanager
def _open_merge(base: ResolvedModel, inputs: Sequence[MergeInput], options: MergeOptions) -> Iterator[_OpenMerge]:
    path = base_path(base)
    with contextlib.ExitStack() as files:
        source = files.enter_context(open_gguf(path))
        described = describe_gguf(source)
        adapters = _open_inputs(base, inputs, described, files)
        additions = _untied(source, described, adapters, options)
        locator = GGUFLocator(source, {item.name: item.source for item in additions})
        plan = plan_gguf_edit(
            source,
            plan_merge(adapters, locator),
            additions=additions,
            imatrix=read_imatrix(options.imatrix) if options.imatrix else None,
            n_threads=options.n_threads,
        )
        planned = PlannedGGUF(plan.fields, plan.entries, plan.size_bytes, plan.alignment, _told(base, additions))
        yield _OpenMerge(plan, planned)


def _merge_folder(
    base: ResolvedModel,
    inputs: Sequence[MergeInput],
    output: Path,
    options: MergeOptions,
    started: float,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
) -> MergedModel:
    if options.untie or options.imatrix is not None:
        raise UsageError(
            f"--{'untie' if options.untie else 'imatrix'} does not go with a Hugging Face folder",
            why="It is for a base in GGUF.",
            next="Convert the base first: ollama-forge convert FOLDER -o base.gguf",
        )
    if output.suffix.lower() == ".gguf":
        raise UsageError(
            f"{str(output)!r} would be a GGUF file, and the base is a Hugging Face folder",
            why="A folder is merged into a folder.",
            next=f"Name a folder (-o {output.stem}), then: ollama-forge convert {output.stem} -o {output}",
        )
    path = base_path(base)
    with contextlib.ExitStack() as files:
        checkpoint = files.enter_context(open_checkpoint(path))
        described = describe_base(path)
        adapters = _open_inputs(base, inputs, described, files)
        if described.is_tied:
            _refuse_ends(described, adapters, "Convert the base to GGUF, and merge into that with --untie.")
        edits = plan_merge(adapters, FolderLocator(checkpoint))
        assert checkpoint.folder is not None
        size_bytes = checkpoint.folder.size_bytes
        losses: list[TensorLoss] = []
        if dry_run:
            require_free_space(output.parent, size_bytes, output.name)
        else:
            with progress(f"Writing {output.name}", size_bytes) as advance:
                losses = write_edited_folder(checkpoint, edits, output, overwrite=overwrite, advance=advance)
        return MergedModel(
            output=output,
            size_bytes=size_bytes,
            sha256="",
            losses=tuple(losses),
            edited=len(edits),
            untouched=len(checkpoint.folder.tensors) - len(edits),
            seconds=time.monotonic() - started,
            warnings=_weak_edits(losses),
            is_dry_run=dry_run,
        )


def _open_inputs(
    base: ResolvedModel, inputs: Sequence[MergeInput], described: LoraBase, files: contextlib.ExitStack
) -> list[WeightedAdapter]:
    layers = [MergeInput(path) for path in base.adapters]
    adapters = []
    for item in (*layers, *inputs):
        adapter = files.enter_context(open_adapter(item.path))
        fitted = settle_base_copies(fit_adapter(adapter, described), base_path(base))
        adapters.append(WeightedAdapter(fitted, item.weight))
    return adapters


def _untied(
    source: GGUFFile, base: LoraBase, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> list[Addition]:
    """The head that a tied base gets, when an adapter changes one end only and the user agrees."""
    if not base.is_tied or not any(_ends_changed(adapter.fitted) for adapter in adapters):
        return []
    if not options.untie or not base.can_untie:
        way = (
            "Add --untie: the model gets a head of its own and grows by the size of its embedding."
            if base.can_untie
            else "llama.cpp gives this family no head of its own; train without the embedding and the head."
        )
        _refuse_ends(base, adapters, way)
    source.find_tensor(EMBEDDING)
    return [Addition(HEAD, EMBEDDING)]


def _refuse_ends(base: LoraBase, adapters: Sequence[WeightedAdapter], way: str) -> None:
    for adapter in adapters:
        for name in _ends_changed(adapter.fitted):
            raise AdapterError(
                f"The adapter's tensor {name!r} changes the embedding or the output head, which are one matrix (tied) "
                f"in {base.name!r}",
                why="The adapter was trained to change one of them; merged as it is, it would change both.",
                next=way,
            )


def _ends_changed(fitted: FittedAdapter) -> list[str]:
    names = [pair.pair.b.name for pair in fitted.pairs if pair.gguf_name in (EMBEDDING, HEAD)]
    return names + [item.replacement.tensor.name for item in fitted.replacements if item.gguf_name in (EMBEDDING, HEAD)]


def _told(base: ResolvedModel, additions: Sequence[Addition]) -> tuple[str, ...]:
    said = []
    if base.adapters:
        said.append(f"The {len(base.adapters)} adapter layers that {base.text!r} has already were merged too.")
    if additions:
        said.append(f"The model now has an output head of its own, {HEAD!r}.")
    return tuple(said)


def _weak_edits(losses: Sequence[TensorLoss]) -> tuple[str, ...]:
    """A warning about changes that the quantization swallowed."""
    weak = [loss for loss in losses if loss.survived < 0.5 and loss.change > 0]
    if not weak:
        return ()
    worst = min(weak, key=lambda loss: loss.survived)
    return (
        f"In {len(weak)} of {len(losses)} tensors less than half of the change survived the quantization, least in "
        f"{worst.name!r} ({worst.survived:.0%} in {worst.type}). An adapter layer keeps all of it.",
    )
