"""The steps `abliterate` and `downsize` of a recipe: the same jobs as the commands, into a step's own folder.

In: the weights as they are, a step, a folder. Out: one GGUF file there. Both jobs keep their stages, so a killed step
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.prompts import find_prompt_files, read_prompts
from ollama_forge.errors import RecipeError
from ollama_forge.files import hash_file, place_copy
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.lineage import unrecorded
from ollama_forge.jobs.merging import MergeInput, MergeOptions, merge_model
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.recipe.schema import AbliterateStep, DownsizeStep
from ollama_forge.train.options import IMPORTANCE_FILE, LoopOptions, LoraOptions, Watch
from ollama_forge.transform.cut_request import UNHEALED, parse_amount, parse_share

RESULT_NAME = "model.gguf"


@dataclass(frozen=True)
class Edited:
    """Edited weights: a GGUF file in the step's folder, and what the job tells of it."""

    path: Path
    sha256: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class EditBench:
    """What an edit may use.

    Attributes:
        ref: the weights as a model argument.
        locate: a path of the recipe, on this disk.
    """

    model: ResolvedModel
    ref: str
    locate: Callable[[str], Path]
    options: LandOptions
    watch: Watch | None = None


def abliterate(step: AbliterateStep, bench: EditBench, output_dir: Path) -> Edited:
    """Compute directions, choose by evidence, apply, ask before and after.

    Raises:
        As `jobs.abliteration_run`.
    """
    from ollama_forge.jobs.abliteration_run import run_abliteration

    result = run_abliteration(_abliterate_request(step, bench, output_dir / "run"), bench.options)
    assert result.edited is not None
    kept = output_dir / RESULT_NAME
    place_copy(result.edited.path, kept, overwrite=True)
    evaluation = result.evaluation or {}
    facts = {
        "bytes": result.edited.size_bytes,
        "matrices": dict(result.edited.matrices),
        "layer": result.choice.options.layer if result.choice else None,
        "scores": dict(evaluation.get("scores", {})),
        "report": str(result.report) if result.report else None,
        "warnings": list(result.warnings),
    }
    return Edited(kept, result.edited.sha256, facts)


def _abliterate_request(step: AbliterateStep, bench: EditBench, folder: Path) -> Any:
    from ollama_forge.jobs.abliteration_work import AbliterateRequest
    from ollama_forge.jobs.directions import ComputeOptions
    from ollama_forge.train.direction_options import DirectionOptions
    from ollama_forge.transform.ablation import AblationOptions

    harmful_paths = [bench.locate(text) for text in step.harmful]
    harmless_paths = [bench.locate(text) for text in step.harmless]
    harmful, harmless = read_prompts(harmful_paths), read_prompts(harmless_paths)
    both = set(harmful) & set(harmless)
    if both:
        raise RecipeError(
            f"{len(both)} prompts are in both lists, among them {min(both)[:60]!r}",
            why="A prompt is either one that the model refuses, or one that it answers.",
            next="Take them out of one of the files.",
        )
    ablation = AblationOptions(
        strength=step.strength,
        attention_strength=step.attention_strength,
        mlp_strength=step.mlp_strength,
        layer=step.layer,
        per_layer=step.per_layer or None,
        n_directions=step.num_directions,
        kernel=step.strength_kernel,
        kernel_center=step.kernel_center,
        kernel_width=step.kernel_width,
        skip_begin=step.skip_begin_layers,
        skip_end=step.skip_end_layers,
        norm_preserving=step.norm_preserving,
        projected=step.projected,
        embedding=step.embedding,
    )
    ablation.validate()
    directions = DirectionOptions(step.method, step.num_directions, per_layer=step.per_layer, positions=step.positions)
    return AbliterateRequest(
        model=bench.ref,
        name=None,
        folder=folder,
        harmful=tuple(harmful[: step.num_prompts]),
        harmless=tuple(harmless[: step.num_prompts]),
        prompt_files=find_prompt_files([*harmful_paths, *harmless_paths]),
        directions=bench.locate(step.directions) if step.directions else None,
        compute=ComputeOptions(directions, step.num_instructions, step.layer_fracs, step.seed, device=step.device),
        ablation=ablation,
        n_trial_prompts=step.num_eval_prompts,
        n_prompts=step.num_prompts,
        quant=step.quant,
        keeps_types=step.quant is None,
        imatrix=bench.locate(step.imatrix) if step.imatrix else None,
        markers=bench.locate(step.markers) if step.markers else None,
        max_tokens=step.max_tokens,
        trial_tokens=step.trial_tokens,
        device=step.device,
        verify=step.verify,
        accept=step.accept,
    )


def downsize(step: DownsizeStep, bench: EditBench, output_dir: Path) -> Edited:
    """Cut, heal, or both; or the whole pipeline towards a target.

    Raises:
        As `jobs.pruning`, `jobs.distillation` and `jobs.downsizing`.
    """
    if step.target is not None:
        return _pipeline(step, bench, output_dir)
    original = _as_gguf(bench, output_dir)
    facts: dict[str, Any] = {}
    current = original
    if step.cuts:
        current, facts = _cut(step, bench, original, output_dir)
    if step.data:
        current, healed = _heal(step, bench, current, original, output_dir)
        cut = [warning for warning in facts.get("warnings", []) if warning != UNHEALED]
        warnings = [*cut, *healed.pop("warnings")]
        facts = {**facts, **healed, "warnings": warnings}
    return _finished(current, output_dir, facts)


def _finished(path: Path, output_dir: Path, facts: dict[str, Any]) -> Edited:
    kept = output_dir / RESULT_NAME
    place_copy(path, kept, overwrite=True)
    return Edited(kept, hash_file(kept).sha256, {**facts, "bytes": kept.stat().st_size})


def _as_gguf(bench: EditBench, output_dir: Path) -> Path:
    if bench.model.gguf_path is not None:
        return bench.model.gguf_path
    assert bench.model.folder is not None
    path = output_dir / "original.gguf"
    if not path.exists():
        convert_folder(bench.model.folder, path, ConvertOptions(), progress=bench.options.progress)
    return path


def _cut(step: DownsizeStep, bench: EditBench, original: Path, output_dir: Path) -> tuple[Path, dict[str, Any]]:
    from ollama_forge.jobs.calibration import CalibrationOptions
    from ollama_forge.jobs.pruning import prune_model
    from ollama_forge.jobs.pruning_request import PruneOptions

    wanted = PruneOptions(
        keep=parse_share(step.keep, "keep") if step.keep else None,
        n_layers=step.layers,
        drop=step.drop_layers,
        width={name: parse_amount(text, name) for name, text in step.width.items()},
        by=step.by,
        calibration=CalibrationOptions(
            text=bench.locate(step.text) if step.text else None,
            n_tokens=step.tokens,
            seed=step.seed,
            device=step.device,
        ),
    )
    path = output_dir / "pruned.gguf"
    # Cutting takes seconds beside healing, so a killed step cuts again.
    done = prune_model(
        ResolvedModel(str(original), gguf_path=original), path, wanted, overwrite=True, progress=bench.options.progress
    )
    return path, {"cut_bytes": done.size_bytes, "warnings": list(done.warnings)}


def _heal(
    step: DownsizeStep, bench: EditBench, student: Path, original: Path, output_dir: Path
) -> tuple[Path, dict[str, Any]]:
    from ollama_forge.jobs.distillation import distill
    from ollama_forge.jobs.distillation_setup import DistillRequest
    from ollama_forge.jobs.finetune_setup import FinetuneRequest

    folder = output_dir / "heal"
    teacher = _teacher(step, bench) or str(original)
    training = FinetuneRequest(
        data=tuple(bench.locate(text) for text in step.data),
        base=str(student),
        name=None,
        folder=folder,
        lora=LoraOptions(step.rank),
        loop=_loop(step),
        include=step.include,
        max_length=step.max_length,
        learn=step.learn,
        skip_landing=True,
        resume=True,
    )
    done = distill(DistillRequest(training, teacher, _distill_options(step)), bench.options, watch=bench.watch)
    trained = done.trained
    assert trained is not None
    facts = {
        "steps": trained.steps,
        "base_divergence": trained.base_divergence,
        "final_divergence": trained.final_divergence,
        "report": str(done.report) if done.report else None,
        "warnings": list(done.warnings),
    }
    if trained.model is not None:
        return trained.model, facts
    assert trained.adapter is not None
    path = output_dir / "healed.gguf"
    merge_model(
        ResolvedModel(str(student), gguf_path=student),
        [MergeInput(trained.adapter)],
        path,
        MergeOptions(imatrix=folder / IMPORTANCE_FILE),
        overwrite=True,
        progress=bench.options.progress,
    )
    return path, facts


def _teacher(step: DownsizeStep, bench: EditBench) -> str:
    """A teacher as the recipe means it: a path from its folder, or the name of a model."""
    if step.teacher is None:
        return ""
    from ollama_forge.source.ref import looks_like_path

    beside = bench.locate(step.teacher)
    return str(beside) if looks_like_path(step.teacher) or beside.exists() else step.teacher


def _distill_options(step: DownsizeStep) -> Any:
    from ollama_forge.train.distill_options import DistillLoss, DistillOptions, Divergence

    return DistillOptions(DistillLoss(Divergence(step.loss)), is_full=step.full)


def _loop(step: DownsizeStep) -> LoopOptions:
    return LoopOptions(
        epochs=step.epochs,
        max_steps=step.max_steps,
        learning_rate=step.lr,
        batch_size=step.batch_size,
        grad_accum=step.grad_accum,
        seed=step.seed,
        device=step.device,
    )


def _pipeline(step: DownsizeStep, bench: EditBench, output_dir: Path) -> Edited:
    from ollama_forge.jobs.downsizing import downsize as run_pipeline
    from ollama_forge.jobs.downsizing_plan import PipelineRequest, parse_goal

    request = PipelineRequest(
        ref=str(_as_gguf(bench, output_dir)),
        name="downsized",
        goal=parse_goal(step.target or ""),
        folder=output_dir / "run",
        data=tuple(bench.locate(text) for text in step.data),
        text=bench.locate(step.text) if step.text else None,
        include=step.include,
        lora=LoraOptions(step.rank),
        loop=_loop(step),
        distill=_distill_options(step),
        max_length=step.max_length,
        learn=step.learn,
    )
    # The pipeline ends in a landing; here the recipe lands, so its own goes into a store that nobody sees.
    unseen = replace(bench.options, store_path=output_dir / "unseen", overwrite=True, check=False)
    with unrecorded():
        done = run_pipeline(request, unseen, watch=bench.watch)
    assert done.result is not None
    facts = {"verdict": done.verdict, "report": str(done.report), "warnings": list(done.warnings)}
    return _finished(done.result, output_dir, facts)
