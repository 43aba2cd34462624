"""Pruning as a whole job: a model in, what matters in it measured, a smaller model out, as a file, a folder, or landed.

In: a model on this disk and how much of it should stay. Out: `PrunedModel`: what stays, how large it is, what was cut
inside its blocks and what that cost, and the ranking by which it was chosen. What cannot be met is refused first.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ollama_forge.errors import ExistsError, UsageError
from ollama_forge.files import (
    Progress,
    no_progress,
    refuse_existing,
    require_free_space,
    temp_path_beside,
)
from ollama_forge.jobs.conversion import ConvertOptions, PlannedGGUF, convert_folder, write_planned
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.pruning_request import PruneOptions, choose, require_prunable, settle_target
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.transform.cut import ModelSizes, read_sizes
from ollama_forge.transform.cut_request import limit_warnings
from ollama_forge.transform.edits import TensorLoss
from ollama_forge.transform.folder import require_free_target
from ollama_forge.transform.prune import PrunedGGUF, plan_gguf_cut
from ollama_forge.transform.prune_folder import PrunedFolder, plan_folder_cut, write_pruned_folder
from ollama_forge.transform.ranking import Importance, KeptPart, dropped_layers, kept_parts, ranking_document
from ollama_forge.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ollama_forge.jobs.landing import LandedModel


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A smaller model, or with `is_dry_run` what would be written.

    Attributes:
        output: the file or folder; None when it was landed only.
        size_bytes: exact, in a dry run too. `source_bytes` are those of the model that was cut.
        dropped: layers of the source that go.
        before, after: the sizes of both models.
        parameters_before, parameters_after: numbers in all tensors.
        importance: what was measured; None when `drop` said it all.
        parts: what stays inside of the layers, where that was cut.
        losses: of tensors that were encoded anew; empty in a dry run.
    """

    output: Path | None
    size_bytes: int
    source_bytes: int
    dropped: tuple[int, ...]
    before: ModelSizes
    after: ModelSizes
    parameters_before: int
    parameters_after: int
    importance: Importance | None
    untouched: int
    sliced: int
    requantized: int
    losses: tuple[TensorLoss, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    is_dry_run: bool = False
    parts: tuple[KeptPart, ...] = ()

    @property
    def kept_share(self) -> float:
        """Of the parameters."""
        return self.parameters_after / max(1, self.parameters_before)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output) if self.output else None,
            "bytes": self.size_bytes,
            "source_bytes": self.source_bytes,
            "parameters": self.parameters_after,
            "source_parameters": self.parameters_before,
            "kept_share": self.kept_share,
            "dropped_layers": list(self.dropped),
            "sizes": _sizes_document(self.after),
            "source_sizes": _sizes_document(self.before),
            "untouched": self.untouched,
            "sliced": self.sliced,
            "requantized": self.requantized,
            "tensors": [loss.document() for loss in self.losses],
            "ranking": ranking_document(self.importance, self.dropped, self.parts) if self.importance else None,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def _sizes_document(sizes: ModelSizes) -> dict[str, int]:
    names = ("n_layers", "hidden", "ffn", "n_heads", "n_kv_heads", "head_dim", "n_experts")
    return {name.removeprefix("n_"): getattr(sizes, name) for name in names}


@dataclass(frozen=True, eq=False)
class _OpenPruning:
    """A cut that is decided; its files stay open."""

    checkpoint: Checkpoint
    plan: PrunedGGUF | PrunedFolder
    dropped: tuple[int, ...]
    importance: Importance | None
    parts: tuple[KeptPart, ...]
    source_bytes: int

    @property
    def gguf(self) -> PlannedGGUF:
        plan = self.plan
        assert isinstance(plan, PrunedGGUF)
        return PlannedGGUF(plan.fields, plan.entries, plan.size_bytes, plan.alignment)

    def result(self, output: Path | None, started: float, *, is_dry_run: bool) -> PrunedModel:
        plan = self.plan
        packed = plan if isinstance(plan, PrunedGGUF) else None
        before = _n_parameters(self.checkpoint)
        warnings = limit_warnings(plan.n_parameters / before)
        if packed is not None and packed.fallbacks:
            first = packed.fallbacks[0]
            warnings += (
                f"{len(packed.fallbacks)} tensors get a larger type, because their rows no longer divide into blocks "
                f"({first.name}: {first.type.name} -> {first.instead.name}).",
            )
        return PrunedModel(
            output=output,
            size_bytes=plan.size_bytes,
            source_bytes=self.source_bytes,
            dropped=self.dropped,
            before=read_sizes(self.checkpoint),
            after=plan.sizes,
            parameters_before=before,
            parameters_after=plan.n_parameters,
            importance=self.importance,
            untouched=len(plan.untouched),
            sliced=len(plan.sliced),
            requantized=len(packed.requantized) if packed else 0,
            losses=tuple(packed.losses) if packed else (),
            seconds=time.monotonic() - started,
            warnings=warnings,
            is_dry_run=is_dry_run,
            parts=self.parts,
        )


def prune_model(
    model: ResolvedModel,
    output: Path,
    options: PruneOptions,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> PrunedModel:
    """Write the smaller model: a GGUF file, or from a Hugging Face folder also a folder.

    Raises:
        UsageError, UnsupportedError: the request cannot be met; nothing was measured or written.
        ExistsError: the output is there and `overwrite` is false, or it is the model itself.
        MissingExtraError: what matters has to be measured, and torch is not installed.
    """
    started = time.monotonic()
    _require_output(model, output, overwrite)
    is_gguf = output.suffix.lower() == ".gguf"
    scratch = _scratch_path() if dry_run else output
    with _open_pruning(model, options, scratch, progress, as_gguf=is_gguf) as pruning:
        if is_gguf:
            # Copying is all that a cut of layers does, so nothing is hashed: that would take longer than the rest.
            write_planned(
                pruning.gguf, output, started, overwrite=overwrite, dry_run=dry_run, is_hashed=False, progress=progress
            )
            return pruning.result(output, started, is_dry_run=dry_run)
        plan = pruning.plan
        assert isinstance(plan, PrunedFolder)
        if dry_run:
            require_free_space(output.parent, plan.size_bytes, output.name)
        else:
            with progress(f"Writing {output.name}", plan.size_bytes) as advance:
                write_pruned_folder(pruning.checkpoint, plan, output, overwrite=overwrite, advance=advance)
        return pruning.result(output, started, is_dry_run=dry_run)


def prune_and_land(
    model: ResolvedModel, name: str, changes: Modelfile, land_options: LandOptions, options: PruneOptions
) -> tuple[PrunedModel, LandedModel]:
    """The smaller model becomes an Ollama model; what else the source says (system prompt, parameters) stays.

    Raises:
        UsageError, UnsupportedError: the request cannot be met; nothing was measured or landed.
        As `jobs.landing` says.
    """
    from ollama_forge.jobs.landing import land_planned  # cutting a file needs none of it
    from ollama_forge.jobs.merging import inherited

    started = time.monotonic()
    with (
        _open_pruning(model, options, _scratch_path(), land_options.progress, as_gguf=True) as pruning,
        pruning_work(model, options, pruning.dropped, changes),
    ):
        landed = land_planned(
            lambda: contextlib.nullcontext(pruning.gguf),
            name,
            inherited(model, changes),
            land_options,
            projector=model.projector,
        )
        return pruning.result(None, started, is_dry_run=land_options.dry_run), landed


def land_pruned(
    output: Path,
    name: str,
    model: ResolvedModel,
    changes: Modelfile,
    land_options: LandOptions,
    options: PruneOptions,
    pruned: PrunedModel,
) -> LandedModel:
    """A model that was cut into a file becomes an Ollama model, too.

    Raises:
        As `jobs.landing` says.
    """
    from ollama_forge.jobs.landing import land_gguf
    from ollama_forge.jobs.merging import inherited

    with pruning_work(model, options, pruned.dropped, changes):
        return land_gguf(output, name, inherited(model, changes), land_options, projector=model.projector)


def pruning_work(
    model: ResolvedModel, options: PruneOptions, dropped: tuple[int, ...], changes: Modelfile
) -> contextlib.AbstractContextManager[None]:
    """What the registry is told of a pruning."""
    from ollama_forge.jobs.lineage import file_ingredient, ingredient_of, modelfile_text, working

    calibration = options.calibration
    data = [] if calibration.text is None else [file_ingredient(calibration.text, "data")]
    return working(
        "prune",
        [ingredient_of(model), *data],
        keep=options.keep,
        layers=options.n_layers,
        width={name: str(amount) for name, amount in options.width.items()},
        by=options.by,
        tokens=calibration.n_tokens,
        context=calibration.context,
        seed=calibration.seed,
        dropped_layers=list(dropped),
        modelfile=modelfile_text(changes),
    )


def _require_output(model: ResolvedModel, output: Path, overwrite: bool) -> None:
    source = model.gguf_path or model.folder
    assert source is not None
    if output.exists() and output.samefile(source):
        raise ExistsError(
            f"{str(output)!r} is the model itself",
            why="A model is never cut in place: it would be lost.",
            next="Choose another name for -o.",
        )
    if output.suffix.lower() == ".gguf":
        refuse_existing(output, overwrite=overwrite)
    elif model.folder is None:
        raise UsageError(
            f"{str(output)!r} does not end with .gguf",
            why="The model is a GGUF file, and so is the result.",
            next=f"Name it: -o {output}.gguf",
        )
    else:
        require_free_target(output, overwrite=overwrite)


@contextlib.contextmanager
def _open_pruning(
    model: ResolvedModel, options: PruneOptions, target: Path, progress: Progress, *, as_gguf: bool
) -> Iterator[_OpenPruning]:
    """Decide everything. A folder is converted into a file beside `target` where that is needed, and the file goes."""
    path = model.gguf_path or model.folder
    assert path is not None
    require_prunable(model, options)
    with contextlib.ExitStack() as files:
        checkpoint = files.enter_context(open_checkpoint(path))
        target_sizes = settle_target(checkpoint, options)
        needs_pass = bool(target_sizes.parts) or (target_sizes.n_layers is not None and not options.drop)
        if needs_pass:
            from ollama_forge.jobs.finetune_setup import require_extra  # a cut of named layers trains nothing

            require_extra()
        packed = checkpoint
        if checkpoint.folder is not None and (needs_pass or as_gguf):
            packed = files.enter_context(_converted(path, target, progress))
        importance = None
        if needs_pass:
            from ollama_forge.jobs.calibration import measure_ranking  # a cut of named layers reads no text

            assert packed.gguf is not None
            importance = measure_ranking(
                packed.gguf, options.calibration, target_sizes.parts, n_threads=options.n_threads, progress=progress
            )
        source = packed if as_gguf else checkpoint
        cut = choose(importance, read_sizes(checkpoint), target_sizes, options)
        plan: PrunedGGUF | PrunedFolder
        plan = plan_gguf_cut(source, cut, n_threads=options.n_threads) if as_gguf else plan_folder_cut(source, cut)
        n_layers = read_sizes(checkpoint).n_layers
        dropped = tuple(dropped_layers(n_layers, cut.layers))
        file = source.gguf or source.folder
        assert file is not None
        parts = kept_parts(importance, cut) if importance is not None else ()
        yield _OpenPruning(source, plan, dropped, importance, parts, file.size_bytes)


def _scratch_path() -> Path:
    """Where a folder becomes a GGUF for a while, when the result does not say on which disk there is room."""
    return Path(tempfile.gettempdir()) / "converted.gguf"


@contextlib.contextmanager
def _converted(folder: Path, target: Path, progress: Progress) -> Iterator[Checkpoint]:
    scratch = temp_path_beside(target)
    try:
        convert_folder(folder, scratch, ConvertOptions(), progress=progress)
        with open_checkpoint(scratch) as checkpoint:
            yield checkpoint
    finally:
        scratch.unlink(missing_ok=True)


def _n_parameters(checkpoint: Checkpoint) -> int:
    file = checkpoint.gguf or checkpoint.folder
    assert file is not None
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in file.tensors.values())
