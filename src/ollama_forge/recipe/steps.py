"""The steps of a recipe, each done by the same job that its command does, into the work folder.

In: the state of the model before a step, the step, and a folder of its own. Out: `StepResult`, the state after it.
Whatever is written under a final name is whole; a fine-tune that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.render import ALPACA_GO_TEMPLATE
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.errors import RecipeError, UsageError
from ollama_forge.files import Progress, hash_file, no_progress, place_copy
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.adapters import prepare_adapter
from ollama_forge.jobs.conversion import ConvertedFile, convert_folder, convert_options, quantize_file, quantize_options
from ollama_forge.jobs.finetune import finetune
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.fit_result import DEFAULT_PASSES, FitRequest, parse_limit
from ollama_forge.jobs.imatrix import read_text
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.measure import built_in_text
from ollama_forge.jobs.merging import MergedModel, MergeInput, MergeOptions, merge_model
from ollama_forge.jobs.quantize_fit import fit_file
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.recipe.edit_steps import EditBench, Edited, abliterate, downsize
from ollama_forge.recipe.inputs import AdapterInput
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.schema import (
    AbliterateStep,
    AdapterStep,
    DownsizeStep,
    FinetuneStep,
    FitStep,
    MergeStep,
    Part,
    QuantizeStep,
)
from ollama_forge.recipe.work import StepResult
from ollama_forge.train.options import IMPORTANCE_FILE, LoopOptions, LoraOptions, Watch

MODEL_NAME = "model.gguf"
_WHOLE_NAME = "whole.gguf"
_OPTION = re.compile(r"--([a-z][a-z-]+)(?: (?=[A-Z])[A-Z]+)?")
MERGED_NAME = "merged"


@dataclass(frozen=True)
class Workbench:
    """What a step may use.

    Attributes:
        source: the recipe's own weights.
        state: after the steps before this one.
        folder: the recipe's.
        adapters: those that the step names, found.
    """

    source: ResolvedModel
    state: StepResult
    folder: Path
    adapters: Sequence[AdapterInput]
    store_path: Path | None
    progress: Progress = no_progress
    watch: Watch | None = None

    @property
    def model(self) -> ResolvedModel:
        """The weights as they are now, with the layers on them."""
        return current_model(self.source, self.state)


def current_model(source: ResolvedModel, state: StepResult) -> ResolvedModel:
    """A source and what was made of it, as one model; layers that a step added come after the source's own."""
    if state.weights is None:
        return replace(source, adapters=(*source.adapters, *state.adapters))
    is_folder = state.weights.is_dir()
    return ResolvedModel(
        str(state.weights),
        gguf_path=None if is_folder else state.weights,
        folder=state.weights if is_folder else None,
        adapters=state.adapters,
        modelfile=source.modelfile,
    )


def run_step(step: Part, bench: Workbench, output_dir: Path) -> StepResult:
    """Do a step.

    Raises:
        Whatever the job of that name raises; then nothing of it counts as done.
    """
    with in_recipe_words(step):
        return _RUNNERS[type(step)](step, bench, output_dir)


@contextlib.contextmanager
def in_recipe_words(step: Part) -> Iterator[None]:
    """What a job says about its command's options, as what to write into the recipe.

    Raises:
        RecipeError: in place of a UsageError.
    """
    try:
        yield
    except UsageError as exc:
        kind = step.model_dump()["kind"]
        way = _OPTION.sub(lambda match: f"`{match[1].replace('-', '_')}: ...`", exc.next)
        raise RecipeError(f"The step `{kind}` cannot be done. {exc.what}", why=exc.why, next=way) from exc


def _quantize(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, QuantizeStep)
    model, output = bench.model, output_dir / MODEL_NAME
    options = quantize_options(
        step.type,
        imatrix=locate(bench.folder, step.imatrix) if step.imatrix else None,
        tensor_types=step.tensor_types,
        output_type=step.output_tensor_type,
        embedding_type=step.token_embedding_type,
        pure=step.pure,
        allow_requantize=step.allow_requantize,
    )
    if model.folder is not None:
        made = convert_folder(
            model.folder, output, convert_options("auto", options), overwrite=True, progress=bench.progress
        )
    else:
        assert model.gguf_path is not None
        made = quantize_file(model.gguf_path, output, options, overwrite=True, progress=bench.progress)
    facts = {"types": {share.type: share.tensors for share in made.types}}
    return _requantized(bench, made, {**facts, "warnings": list(made.warnings)})


def _requantized(bench: Workbench, made: ConvertedFile, facts: Mapping[str, object]) -> StepResult:
    """The state with other weights; adapter layers stay on them."""
    return replace(
        bench.state,
        weights=made.output,
        adapters=bench.model.adapters if bench.state.weights is None else bench.state.adapters,
        outputs={made.output.name: made.sha256},
        facts={"bytes": made.size_bytes, **facts},
    )


def _adapter(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, AdapterStep)
    (found,) = bench.adapters
    prepared = prepare_adapter(found.fetch(), bench.model, output_dir)
    kept = output_dir / "adapter.gguf"
    if prepared.parent == output_dir:
        prepared.replace(kept)
    else:
        place_copy(prepared, kept, overwrite=True, may_hardlink=False)
    return replace(
        bench.state,
        adapters=(*bench.state.adapters, kept),
        outputs={kept.name: hash_file(kept).sha256},
        facts={"bytes": kept.stat().st_size},
    )


def _merge(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, MergeStep)
    weights = step.weights or (1.0,) * len(bench.adapters)
    inputs = [MergeInput(found.fetch(), weight) for found, weight in zip(bench.adapters, weights, strict=True)]
    imatrix = locate(bench.folder, step.imatrix) if step.imatrix else None
    return _merged(bench, inputs, MergeOptions(untie=step.untie, imatrix=imatrix), output_dir)


def _merged(
    bench: Workbench, inputs: Sequence[MergeInput], options: MergeOptions, output_dir: Path, **facts: Any
) -> StepResult:
    is_folder = bench.model.folder is not None
    output = output_dir / (MERGED_NAME if is_folder else MODEL_NAME)
    made = merge_model(bench.model, inputs, output, options, overwrite=True, progress=bench.progress)
    outputs = {path.name: hash_file(path).sha256 for path in output.iterdir()} if is_folder else {}
    return replace(
        bench.state,
        weights=output,
        adapters=(),
        outputs=outputs or {output.name: made.sha256},
        facts={**_merge_facts(made), **facts},
    )


def _merge_facts(made: MergedModel) -> dict[str, Any]:
    return {
        "bytes": made.size_bytes,
        "edited": made.edited,
        "untouched": made.untouched,
        "warnings": list(made.warnings),
    }


def _finetune(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, FinetuneStep)
    run_dir = output_dir / "run"
    request = FinetuneRequest(
        data=tuple(locate(bench.folder, text) for text in step.data),
        base=_ref_of(bench.model),
        name=None,
        folder=run_dir,
        lora=LoraOptions(step.rank, step.alpha, step.dropout, step.target_modules),
        loop=loop_options(step),
        include=step.include,
        max_length=step.max_length,
        overlong=step.overlong,
        learn=step.learn,
        validation_share=step.val_split,
        skip_landing=True,
        resume=True,
    )
    done = finetune(request, LandOptions(bench.store_path, progress=bench.progress), watch=bench.watch)
    assert done.trained is not None and done.adapter_gguf is not None
    facts = {
        "steps": done.trained.steps,
        "base_loss": done.trained.base_loss,
        "final_loss": done.trained.final_loss,
        "report": str(done.report),
        "warnings": list(done.warnings),
    }
    kept = output_dir / "adapter.gguf"
    place_copy(done.adapter_gguf, kept, overwrite=True, may_hardlink=False)
    trained = replace(bench.state, template=_wanted_template(request, bench.model))
    if step.merge:
        options = MergeOptions(imatrix=None if bench.model.folder is not None else run_dir / IMPORTANCE_FILE)
        path = done.trained.folder if bench.model.folder is not None else kept
        return _merged(replace(bench, state=trained), [MergeInput(path)], options, output_dir, **facts)
    return replace(
        trained,
        adapters=(*bench.state.adapters, kept),
        outputs={kept.name: hash_file(kept).sha256},
        facts={**facts, "bytes": kept.stat().st_size},
    )


def _ref_of(model: ResolvedModel) -> str:
    if model.installed is not None:
        return model.installed.name.display
    return str(model.gguf_path or model.folder)


def loop_options(step: FinetuneStep) -> LoopOptions:
    """A step's training loop."""
    return LoopOptions(
        epochs=step.epochs,
        max_steps=step.max_steps,
        learning_rate=step.lr,
        batch_size=step.batch_size,
        grad_accum=step.grad_accum,
        warmup=step.warmup,
        scheduler=step.scheduler,
        seed=step.seed,
        early_stop=step.early_stop,
        checkpoint_every=step.checkpoint_every,
        checkpointing=step.checkpointing,
        device=step.device,
    )


def _wanted_template(request: FinetuneRequest, model: ResolvedModel) -> str | None:
    """A model without a chat template learns Alpaca blocks, and Ollama must send the same ones."""
    if model.gguf_path is None or model.modelfile.template is not None:
        return None
    with open_gguf(model.gguf_path) as gguf:
        if "tokenizer.chat_template" in gguf.metadata:
            return None
    examples = read_dataset(find_data_files(request.data, request.include)).examples
    return ALPACA_GO_TEMPLATE if any(not example.is_plain for example in examples) else None


def _abliterate(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, AbliterateStep)
    return _edited(bench, abliterate(step, _edit_bench(bench), output_dir))


def _downsize(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, DownsizeStep)
    return _edited(bench, downsize(step, _edit_bench(bench), output_dir))


def _edit_bench(bench: Workbench) -> EditBench:
    options = LandOptions(bench.store_path, progress=bench.progress)
    model = bench.model
    return EditBench(model, _ref_of(model), lambda text: locate(bench.folder, text), options, bench.watch)


def _fit(step: Any, bench: Workbench, output_dir: Path) -> StepResult:
    assert isinstance(step, FitStep)
    model, output = bench.model, output_dir / MODEL_NAME
    imatrix = locate(bench.folder, step.imatrix) if step.imatrix else None
    options = quantize_options("Q4_K_M", imatrix=imatrix, allow_requantize=step.allow_requantize)
    request = FitRequest(
        limit_bytes=parse_limit(step.size),
        text=read_text(locate(bench.folder, step.text)) if step.text else built_in_text(),
        context=step.context,
        max_passes=step.passes or DEFAULT_PASSES,
    )
    whole = model.gguf_path
    if whole is None:
        assert model.folder is not None
        whole = output_dir / _WHOLE_NAME
        convert_folder(model.folder, whole, convert_options("auto", None), overwrite=True, progress=bench.progress)
    fit = fit_file(whole, output, request, options, overwrite=True, progress=bench.progress)
    if whole.parent == output_dir:
        whole.unlink()
    assert fit.written is not None
    facts = {"chosen": fit.chosen, "kl": fit.kl, "context": fit.context, "warnings": list(fit.warnings)}
    return _requantized(bench, fit.written, facts)


def _edited(bench: Workbench, done: Edited) -> StepResult:
    return replace(bench.state, weights=done.path, adapters=(), outputs={done.path.name: done.sha256}, facts=done.facts)


_RUNNERS: Mapping[type[Part], Callable[[Any, Workbench, Path], StepResult]] = {
    QuantizeStep: _quantize,
    FitStep: _fit,
    AdapterStep: _adapter,
    MergeStep: _merge,
    FinetuneStep: _finetune,
    AbliterateStep: _abliterate,
    DownsizeStep: _downsize,
}
