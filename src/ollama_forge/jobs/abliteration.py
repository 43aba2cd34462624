"""Abliteration as a whole job: directions are taken out of what a model's weights write.

In: a model on this disk and a file of directions (`jobs.directions` computes them). Out: `AblatedModel`, which says how
many matrices of each role were edited and what storing each edit cost. All other tensors stay byte for byte.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import AdapterError, ExistsError, UsageError
from ollama_forge.files import Progress, no_progress, refuse_existing, require_free_space
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.jobs.adapters import base_path, convert_adapter
from ollama_forge.jobs.conversion import ConvertOptions, PlannedGGUF, write_planned
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.transform.ablation import Ablation, AblationOptions, plan_ablation
from ollama_forge.transform.ablation_lora import can_be_lora, plan_ablation_lora
from ollama_forge.transform.apply import EditedGGUF, plan_gguf_edit
from ollama_forge.transform.directions import Directions, read_directions
from ollama_forge.transform.edits import TensorLoss
from ollama_forge.transform.folder import write_edited_folder
from ollama_forge.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ollama_forge.jobs.landing import LandedModel


@dataclass(frozen=True)
class ApplyOptions:
    """How an ablation is written.

    Attributes:
        as_lora: an adapter beside the model, which can be switched off, instead of edited weights.
        imatrix: importance matrix for the tensors that are quantized again.
    """

    ablation: AblationOptions = field(default_factory=AblationOptions)
    as_lora: bool = False
    imatrix: Path | None = None
    n_threads: int | None = None


@dataclass(frozen=True)
class AblatedModel:
    """An ablated model or its LoRA, or with `is_dry_run` what would be written.

    Attributes:
        output: the file or folder; None when it was landed only.
        sha256: of a GGUF; empty where it was not asked for.
        counts: how many matrices and vectors of each role are edited.
        losses: for each edited tensor, what storing it cost; empty in a dry run and for a LoRA.
        edited, untouched: numbers of tensors.
    """

    output: Path | None
    size_bytes: int
    sha256: str
    counts: Mapping[str, int]
    losses: tuple[TensorLoss, ...]
    edited: int
    untouched: int
    seconds: float
    is_lora: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output) if self.output else None,
            "bytes": self.size_bytes,
            "sha256": self.sha256 or None,
            "counts": dict(self.counts),
            "edited": self.edited,
            "untouched": self.untouched,
            "lora": self.is_lora,
            "tensors": [loss.document() for loss in self.losses],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def apply_ablation(
    model: ResolvedModel,
    directions: Path,
    output: Path,
    options: ApplyOptions | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    is_hashed: bool = False,
    progress: Progress = no_progress,
) -> AblatedModel:
    """Write the ablated model: a GGUF from a GGUF, a folder from a folder; or the LoRA, as GGUF or as a PEFT folder.

    Args:
        is_hashed: whether the `sha256` of a GGUF is wanted; it would take longer than everything else.

    Raises:
        UsageError: an option that does not go with the model or the directions.
        UnsupportedError: a family without rows, tensors that are not known, or an encoding that cannot be edited.
        FormatError: a tensor that should write the residual stream is missing.
        AdapterError: the model has adapter layers; or what a LoRA cannot say is asked of one.
        ExistsError: the output is there and `overwrite` is false, or it is the model itself.
    """
    started = time.monotonic()
    options = options or ApplyOptions()
    _require_plain(model)
    _require_output(model, output, options)
    with _open_ablation(model, directions, options) as (checkpoint, ablation):
        if options.as_lora:
            return _write_lora(model, checkpoint, ablation, output, started, overwrite, dry_run, progress)
        if model.folder is not None:
            return _write_folder(checkpoint, ablation, output, started, overwrite, dry_run, progress)
        refuse_existing(output, overwrite=overwrite)
        plan, planned = _plan_gguf(checkpoint, ablation, options)
        written = write_planned(
            planned, output, started, overwrite=overwrite, dry_run=dry_run, is_hashed=is_hashed, progress=progress
        )
        result = _result(ablation, plan, planned, started, is_dry_run=dry_run)
        return replace(result, output=output, sha256=written.sha256)


def ablate_and_land(
    model: ResolvedModel,
    directions: Path,
    name: str,
    changes: Modelfile,
    land_options: LandOptions,
    options: ApplyOptions | None = None,
) -> tuple[AblatedModel, LandedModel]:
    """The ablated model becomes an Ollama model; what else the model says (system prompt, parameters) stays.

    Raises:
        As `apply_ablation` and `jobs.landing`; nothing is landed then.
    """
    from ollama_forge.jobs.creation import Creation, create_model  # writing a file needs none of it
    from ollama_forge.jobs.landing import import_folder, land_planned
    from ollama_forge.jobs.lineage import file_ingredient, ingredient_of, working
    from ollama_forge.jobs.merging import inherited

    started = time.monotonic()
    options = options or ApplyOptions()
    _require_plain(model)
    matrix = [file_ingredient(options.imatrix, "imatrix")] if options.imatrix else []
    work = working(
        "abliterate",
        [ingredient_of(model), file_ingredient(directions, "directions"), *matrix],
        ablation=asdict(options.ablation),
        as_lora=options.as_lora,
    )
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        if options.as_lora:
            lora = scratch / "ablation.gguf"
            done = apply_ablation(model, directions, lora, options, progress=land_options.progress)
            stack.enter_context(work)
            landed = create_model(Creation(model.text, changes, (lora,)), name, land_options)
            return replace(done, output=None, is_dry_run=land_options.dry_run), landed
        wanted = inherited(model, changes)
        if model.folder is not None:
            is_dry_run = land_options.dry_run
            done = apply_ablation(
                model, directions, scratch / "ablated", options, dry_run=is_dry_run, progress=land_options.progress
            )
            folder = model.folder if is_dry_run else scratch / "ablated"
            stack.enter_context(work)
            landed = import_folder(folder, name, wanted, land_options, ConvertOptions(n_threads=options.n_threads))
            return replace(done, output=None), landed
        checkpoint, ablation = stack.enter_context(_open_ablation(model, directions, options))
        plan, planned = _plan_gguf(checkpoint, ablation, options)
        stack.enter_context(work)
        landed = land_planned(
            lambda: contextlib.nullcontext(planned), name, wanted, land_options, projector=model.projector
        )
        return _result(ablation, plan, planned, started, is_dry_run=land_options.dry_run), landed


def _require_plain(model: ResolvedModel) -> None:
    if model.adapters:
        raise AdapterError(
            f"{model.text!r} has {len(model.adapters)} adapter layers",
            why="They write the residual stream, too; editing the base alone would leave the direction in them.",
            next=f"Merge them first: ollama-forge merge {model.text} --name NAME",
        )


def _require_output(model: ResolvedModel, output: Path, options: ApplyOptions) -> None:
    if output.exists() and output.samefile(base_path(model)):
        raise ExistsError(
            f"{str(output)!r} is the model itself",
            why="A model is never edited in place: it would be lost.",
            next="Choose another name for -o.",
        )
    is_gguf = output.suffix.lower() == ".gguf"
    if options.as_lora:
        _require_lora(options)
        return
    if model.folder is None and not is_gguf:
        raise UsageError(
            f"{str(output)!r} does not end with .gguf",
            why="The model is a GGUF file, and so is the result.",
            next=f"Name it: -o {output}.gguf",
        )
    if model.folder is not None and is_gguf:
        raise UsageError(
            f"{str(output)!r} would be a GGUF file, and the model is a Hugging Face folder",
            why="A folder is edited into a folder.",
            next=f"Name a folder (-o {output.stem}), then: ollama-forge convert {output.stem} -o {output}",
        )
    if model.folder is not None and options.imatrix is not None:
        raise UsageError(
            "--imatrix does not go with a Hugging Face folder",
            why="Nothing is quantized there.",
            next="Convert the folder first: ollama-forge convert FOLDER -o model.gguf",
        )


def _require_lora(options: ApplyOptions) -> None:
    if options.ablation.norm_preserving:
        raise UsageError(
            "A LoRA cannot keep the norms of rows",
            why="Scaling rows is no change of low rank.",
            next="Leave out --norm-preserving, or --as-lora.",
        )
    if options.imatrix is not None:
        raise UsageError(
            "--imatrix does not go with --as-lora", why="Nothing is quantized there.", next="Leave out --imatrix."
        )


@contextlib.contextmanager
def _open_ablation(
    model: ResolvedModel, directions: Path, options: ApplyOptions
) -> Iterator[tuple[Checkpoint, Ablation]]:
    found: Directions = read_directions(directions)
    with open_checkpoint(base_path(model)) as checkpoint:
        yield checkpoint, plan_ablation(checkpoint, found, options.ablation)


def _plan_gguf(checkpoint: Checkpoint, ablation: Ablation, options: ApplyOptions) -> tuple[EditedGGUF, PlannedGGUF]:
    assert checkpoint.gguf is not None
    plan = plan_gguf_edit(
        checkpoint.gguf,
        ablation.edits,
        imatrix=read_imatrix(options.imatrix) if options.imatrix else None,
        n_threads=options.n_threads,
    )
    return plan, PlannedGGUF(plan.fields, plan.entries, plan.size_bytes, plan.alignment)


def _result(
    ablation: Ablation, plan: EditedGGUF, planned: PlannedGGUF, started: float, *, is_dry_run: bool
) -> AblatedModel:
    return AblatedModel(
        output=None,
        size_bytes=planned.size_bytes,
        sha256="",
        counts=ablation.counts,
        losses=tuple(plan.losses),
        edited=len(plan.edited),
        untouched=len(plan.entries) - len(plan.edited),
        seconds=time.monotonic() - started,
        notes=ablation.notes,
        warnings=_weak_edits(plan.losses),
        is_dry_run=is_dry_run,
    )


def _write_folder(
    checkpoint: Checkpoint,
    ablation: Ablation,
    output: Path,
    started: float,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
) -> AblatedModel:
    assert checkpoint.folder is not None
    size_bytes = checkpoint.folder.size_bytes
    losses: list[TensorLoss] = []
    if dry_run:
        require_free_space(output.parent, size_bytes, output.name)
    else:
        with progress(f"Writing {output.name}", size_bytes) as advance:
            losses = write_edited_folder(checkpoint, ablation.edits, output, overwrite=overwrite, advance=advance)
    return AblatedModel(
        output=output,
        size_bytes=size_bytes,
        sha256="",
        counts=ablation.counts,
        losses=tuple(losses),
        edited=len(ablation.edits),
        untouched=len(checkpoint.folder.tensors) - len(ablation.edits),
        seconds=time.monotonic() - started,
        notes=ablation.notes,
        warnings=_weak_edits(losses),
        is_dry_run=dry_run,
    )


def _write_lora(
    model: ResolvedModel,
    checkpoint: Checkpoint,
    ablation: Ablation,
    output: Path,
    started: float,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
) -> AblatedModel:
    """The LoRA; the tied embedding, which llama.cpp takes none for, is left out and said."""
    said = [item for item in ablation.projections if can_be_lora(checkpoint, item)]
    left_out = [item for item in ablation.projections if item not in said]
    if any(item.part.value != "embedding" for item in left_out) or not said:
        said = list(ablation.projections)  # the plan names what cannot be said
    lora = plan_ablation_lora(checkpoint, said)
    planned = PlannedGGUF(lora.fields, lora.entries, lora.size_bytes)
    notes = ablation.notes
    counts = dict(ablation.counts)
    if len(said) < len(ablation.projections):
        notes = ("The embedding stays as it is: llama.cpp takes no LoRA for one that is the output head too.",)
        for item in left_out:
            counts.pop(item.tensor.row.role.value, None)
    sha256 = ""
    if output.suffix.lower() == ".gguf":
        refuse_existing(output, overwrite=overwrite)
        sha256 = write_planned(planned, output, started, overwrite=overwrite, dry_run=dry_run, progress=progress).sha256
    elif not dry_run:
        with scratch_folder() as scratch:
            path = scratch / "ablation.gguf"
            write_planned(planned, path, started, overwrite=False, dry_run=False, progress=progress)
            convert_adapter(path, output, model, overwrite=overwrite)
    return AblatedModel(
        output=output,
        size_bytes=lora.size_bytes,
        sha256=sha256,
        counts=counts,
        losses=(),
        edited=len(said),
        untouched=len(checkpoint.tensors) - len(said),
        seconds=time.monotonic() - started,
        is_lora=True,
        notes=notes,
        is_dry_run=dry_run,
    )


def _weak_edits(losses: list[TensorLoss]) -> tuple[str, ...]:
    """A warning about edits that the quantization swallowed."""
    weak = [loss for loss in losses if loss.survived < 0.5 and loss.change > 0]
    if not weak:
        return ()
    worst = min(weak, key=lambda loss: loss.survived)
    return (
        f"In {len(weak)} of {len(losses)} tensors less than half of the edit survived the quantization, least in "
        f"{worst.name!r} ({worst.survived:.0%} in {worst.type}). --as-lora keeps all of it.",
    )
