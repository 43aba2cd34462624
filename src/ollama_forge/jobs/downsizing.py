"""A model made smaller from end to end: cut, heal, measure, step by step; quantize, compare, land.

In: a `PipelineRequest`. Out: a `DownsizeResult`. Each step leaves one file in the working folder, whole or absent, and
a run finds what is there: stopped at any moment, the same command goes on and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.render import RenderOptions
from ollama_forge.dataset.tokenize import tokenize_examples
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.errors import ExistsError, InterruptedRunError, NotFoundError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.calibration import DATA_SUFFIXES, CalibrationOptions
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder, quantize_file, quantize_options
from ollama_forge.jobs.distillation import distill
from ollama_forge.jobs.distillation_setup import DistillRequest, metadata_of
from ollama_forge.jobs.downsizing_plan import PipelinePlan, PipelineRequest, PruneStep, plan_pipeline
from ollama_forge.jobs.downsizing_report import Row, judge_rows, measure_speed, write_comparison
from ollama_forge.jobs.finetune_setup import FinetuneRequest, require_extra, require_free_name
from ollama_forge.jobs.land_options import LandOptions, removal_command
from ollama_forge.jobs.landing import LandedModel, land_gguf
from ollama_forge.jobs.lineage import file_ingredient, hashed_ingredient, modelfile_text, weights_digest, working
from ollama_forge.jobs.measure import MeasureRequest, measure
from ollama_forge.jobs.merging import MergeInput, MergeOptions, inherited, merge_model
from ollama_forge.jobs.pruning import PruneOptions, prune_model
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.run_folder import RUN_FILE, removal_of
from ollama_forge.train.options import IMPORTANCE_FILE, Watch, plan_steps, settle

if TYPE_CHECKING:
    from ollama_forge.jobs.distillation import DistillResult

PIPELINE_FILE = "pipeline.json"
FINAL_FILE = "final.gguf"
LOWER_FILE = "lower.gguf"

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class DownsizeResult:
    """What came of it; a dry run has a plan only.

    Attributes:
        rows: original, pruned, healed, result, lower quantization, as measured.
        verdict: one sentence about which is the better choice.
        warnings: what the healings told, each once.
        undo: commands that take it all back.
    """

    plan: PipelinePlan
    result: Path | None = None
    rows: tuple[Row, ...] = ()
    verdict: str = ""
    landed: LandedModel | None = None
    report: Path | None = None
    warnings: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "plan": self.plan.document(),
            "dry_run": self.result is None,
            "result": str(self.result) if self.result else None,
            "models": [row.document() for row in self.rows],
            "verdict": self.verdict,
            "landed": self.landed.document() if self.landed else None,
            "report": str(self.report) if self.report else None,
            "warnings": list(self.warnings),
            "undo": list(self.undo),
        }


def downsize(
    request: PipelineRequest,
    options: LandOptions,
    *,
    on_plan: Callable[[PipelinePlan], None] | None = None,
    on_step: OnStep | None = None,
    watch: Watch | None = None,
) -> DownsizeResult:
    """Do the whole job, or what is left of it; with `options.dry_run` only the plan.

    Raises:
        UsageError: a goal that cannot be met.
        ExistsError: the name is taken, or the working folder holds another job.
        InterruptedRunError: Ctrl-C while it heals; the same request goes on.
        As the jobs of the single steps.
    """
    plan, model = prepare(request, options)
    if on_plan:
        on_plan(plan)
    if options.dry_run:
        return DownsizeResult(plan)
    return _Pipeline(request, options, plan, model, on_step or (lambda _text: None), watch).run()


def prepare(request: PipelineRequest, options: LandOptions) -> tuple[PipelinePlan, ResolvedModel]:
    """Check all there is to check, and plan."""
    model = resolve(request.ref, options.store_path)
    training = _training(request, request.ref, request.folder)
    if request.quant is not None:
        quantize_options(request.quant)
    require_free_name(replace(training, skip_landing=False), options)
    require_extra(request.loop)
    if request.text is not None and not request.text.is_file():
        raise NotFoundError(f"There is no text {str(request.text)!r}", next="Check the path given to --text.")
    return plan_pipeline(request, model, count_tokens(request, model)), model


def count_tokens(request: PipelineRequest, model: ResolvedModel) -> int:
    """What one healing reads, all its epochs together."""
    dataset = read_dataset(find_data_files(request.data, request.include))
    tokenized = tokenize_examples(
        dataset.examples,
        chat_format_of(metadata_of(model)),
        max_length=request.max_length,
        options=RenderOptions(learn=request.learn),
    )
    loop = settle(request.loop, len(tokenized.rows))
    rows = plan_steps(len(tokenized.rows), loop) * loop.batch_size * loop.grad_accum
    return round(tokenized.n_tokens / len(tokenized.rows) * rows)


def _training(request: PipelineRequest, base: str, folder: Path) -> FinetuneRequest:
    return FinetuneRequest(
        data=request.data,
        base=base,
        name=request.name,
        folder=folder,
        lora=request.lora,
        loop=request.loop,
        include=request.include,
        max_length=request.max_length,
        learn=request.learn,
        skip_landing=True,
    )


@dataclass
class _Pipeline:
    """The steps, each of which does nothing where its file is there."""

    request: PipelineRequest
    options: LandOptions
    plan: PipelinePlan
    model: ResolvedModel
    say: OnStep
    watch: Watch | None
    warnings: list[str] = field(default_factory=list)

    def run(self) -> DownsizeResult:
        request = self.request
        self._claim()
        original = self._original()
        pruned = healed = original
        for step in self.plan.steps:
            pruned = self._prune(step, healed)
            healed = self._heal(step, pruned, original)
            self._measure(pruned, original)
            self._measure(healed, original)
        result = self._quantize(healed, FINAL_FILE, request.quant) if request.quant else healed
        lower = self._quantize(original, LOWER_FILE, self.plan.lower_type)
        named = [("original", original), ("pruned", pruned), ("healed", healed)]
        if result != healed:
            named.append((f"healed, {request.quant}", result))
        named.append((f"original, {self.plan.lower_type}", lower))
        self.say("Comparing")
        rows = tuple(self._row(name, path, original) for name, path in named)
        verdict = judge_rows(rows)
        report = write_comparison(request.folder, request.ref, rows, verdict, self.plan)
        scores = {"kl_mean": rows[-2].kl_mean, "perplexity": rows[-2].perplexity}
        with self._work(scores):
            wanted = inherited(self.model, request.changes)
            landed = land_gguf(result, request.name, wanted, self.options, projector=self.model.projector)
        warnings = tuple(dict.fromkeys(self.warnings))
        undo = (removal_command(landed.name, self.options), removal_of(request.folder))
        return DownsizeResult(self.plan, result, rows, verdict, landed, report, warnings, undo)

    def _work(self, scores: dict[str, float]) -> contextlib.AbstractContextManager[None]:
        """What the registry is told: the model, data, text, settings; enough to do it again."""
        request = self.request
        sources = [hashed_ingredient(self.model)]
        sources += [hashed_ingredient(path, "data") for path in find_data_files(request.data, request.include)]
        sources += [hashed_ingredient(request.text, "text")] if request.text else []
        return working(
            "downsize",
            sources,
            scores,
            target=request.goal.text,
            layers=[step.n_layers for step in self.plan.steps],
            quant=request.quant,
            lora=asdict(request.lora),
            loop=asdict(request.loop),
            distill=asdict(request.distill),
            max_length=request.max_length,
            learn=request.learn,
            modelfile=modelfile_text(request.changes),
        )

    def _claim(self) -> None:
        request = self.request
        asked = {
            "model": self._identity(),
            "layers": [step.n_layers for step in self.plan.steps],
            "quant": request.quant,
            "data": [file_ingredient(path, "data").digest for path in find_data_files(request.data, request.include)],
            "text": file_ingredient(request.text, "text").digest if request.text else None,
            "lora": asdict(request.lora),
            "loop": asdict(request.loop),
            "distill": asdict(request.distill),
            "max_length": request.max_length,
            "learn": request.learn,
        }
        text = json.dumps(asked, indent=2, sort_keys=True)
        path = request.folder / PIPELINE_FILE
        make_folder(request.folder)
        has_work = any(entry.name != PIPELINE_FILE for entry in request.folder.iterdir())
        if not path.exists() or not has_work:
            write_bytes(path, text.encode(), overwrite=True)
        elif path.read_text(encoding="utf-8") != text:
            raise ExistsError(
                f"{str(request.folder)!r} holds another downsizing",
                why="Model, target, data or options differ from those it began with.",
                next="Choose another --workdir, or remove the folder: "
                f"{removal_of(request.folder)} (the command it began with goes on).",
            )

    def _identity(self) -> str:
        if self.model.gguf_path is not None:
            return weights_digest(self.model.gguf_path)
        assert self.model.folder is not None
        return str(self.model.folder.absolute())

    def _original(self) -> Path:
        """The model as one GGUF file."""
        if self.model.gguf_path is not None:
            return self.model.gguf_path
        assert self.model.folder is not None
        path = self.request.folder / "original.gguf"
        if not path.exists():
            self.say("Converting the original")
            convert_folder(self.model.folder, path, ConvertOptions(), progress=self.options.progress)
        return path

    def _prune(self, step: PruneStep, source: Path) -> Path:
        path = self.request.folder / f"step-{step.number}-pruned.gguf"
        if not path.exists():
            self.say(f"Step {step.number}: cutting to {step.n_layers} layers")
            calibration = CalibrationOptions(text=self.request.text, device=self.request.loop.device)
            wanted = PruneOptions(n_layers=step.n_layers, calibration=calibration)
            prune_model(_at(source), path, wanted, progress=self.options.progress)
        return path

    def _heal(self, step: PruneStep, pruned: Path, original: Path) -> Path:
        path = self.request.folder / f"step-{step.number}-healed.gguf"
        if path.exists():
            return path
        self.say(f"Step {step.number}: healing by distillation from the original")
        folder = self.request.folder / f"heal-{step.number}"
        training = replace(_training(self.request, str(pruned), folder), resume=(folder / RUN_FILE).exists())
        cache = self.request.folder / "teacher"
        healing = DistillRequest(training, str(original), self.request.distill, cache=cache)
        try:
            done = distill(healing, self.options, watch=self.watch)
        except InterruptedRunError as exc:
            raise InterruptedRunError(exc.what, why=exc.why, next="Run the same command again to go on.") from exc
        self.warnings += done.warnings
        self._settle(done, pruned, folder, path)
        return path

    def _settle(self, done: DistillResult, pruned: Path, folder: Path, path: Path) -> None:
        """Training's result as a file of its own, under its final name last."""
        trained = done.trained
        assert trained is not None
        if trained.model is not None:
            trained.model.replace(path)
            return
        assert trained.adapter is not None
        merge_model(
            _at(pruned),
            [MergeInput(trained.adapter)],
            path,
            MergeOptions(imatrix=folder / IMPORTANCE_FILE),
            progress=self.options.progress,
        )

    def _quantize(self, source: Path, name: str, file_type: str) -> Path:
        path = self.request.folder / name
        if not path.exists():
            self.say(f"Quantizing {source.name} to {file_type}")
            quantize_file(
                source, path, quantize_options(file_type, allow_requantize=True), progress=self.options.progress
            )
        return path

    def _measure(self, path: Path, original: Path) -> dict[str, float]:
        """Perplexity and divergence from the original, kept beside the file."""
        kept = self.request.folder / "scores" / f"{path.stem}.json"
        if path != original and kept.exists():
            document: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
            return document
        if path != original:
            self.say(f"Measuring {path.name}")
        text = self.request.text
        is_data = text is not None and text.suffix.lower() in DATA_SUFFIXES
        wanted = MeasureRequest(
            text=None if is_data else text, prompts=text if is_data else None, device=self.request.loop.device
        )
        scores = measure(str(path), str(original), wanted, progress=self.options.progress).scores()
        if path != original:
            write_bytes(kept, json.dumps(scores, sort_keys=True).encode(), overwrite=True)
        return scores

    def _row(self, name: str, path: Path, original: Path) -> Row:
        with open_gguf(path) as gguf:
            size_bytes = gguf.size_bytes
        scores = {"kl_mean": 0.0} if path == original else self._measure(path, original)
        perplexity = scores.get("perplexity")
        if perplexity is None:  # the original: each measurement of another has told it
            healed = self.request.folder / f"step-{self.plan.steps[-1].number}-healed.gguf"
            perplexity = self._measure(healed, original)["perplexity_against"]
        return Row(name, size_bytes, perplexity, scores["kl_mean"], measure_speed(path))


def _at(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), gguf_path=path)
