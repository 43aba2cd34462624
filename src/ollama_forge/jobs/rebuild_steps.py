"""Each recorded step, done once more: import, quantize, create, merge, finetune, abliterate, prune, distill, downsize.

In: a `Landing` and the models that it read, in place. Out: what it lands, in the store that the options name. The
parameters are those that `jobs.lineage.working` was given when the step was done first.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ollama_forge.convert.plan import ConvertOptions
from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.types import FileType, GGMLType
from ollama_forge.jobs.abliteration_repeat import repeat_abliteration
from ollama_forge.jobs.adapters import prepare_adapter
from ollama_forge.jobs.distillation import distill
from ollama_forge.jobs.distillation_setup import DistillRequest, StudentCut
from ollama_forge.jobs.downsizing import downsize
from ollama_forge.jobs.downsizing_plan import PipelineRequest, parse_goal
from ollama_forge.jobs.finetune import RECORDED_SETTINGS, TWIN, finetune
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.hub_local import fetch_adapter_files, fetch_file, fetch_model_path
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder, land_gguf, land_installed
from ollama_forge.jobs.merging import MergeInput, MergeOptions, merge_and_land
from ollama_forge.jobs.pruning import prune_and_land
from ollama_forge.jobs.pruning_request import CalibrationOptions, PruneOptions
from ollama_forge.jobs.quantizing import quantize_and_land
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.jobs.teacher_answers import ANSWERS, AskOptions
from ollama_forge.jobs.text_distillation import TextDistillRequest, distill_text
from ollama_forge.registry.document import Landing, Parent
from ollama_forge.source.hub_files import RepoName
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.modelfile import Modelfile, parse_modelfile
from ollama_forge.train.distill_options import DistillLoss, DistillOptions, Divergence, OnPolicy
from ollama_forge.train.options import LoopOptions, LoraOptions
from ollama_forge.transform.cut_request import parse_amount

STEPS = ("import", "quantize", "create", "merge", "finetune", "abliterate", "prune", "distill", "downsize")
MODELS = ("base", "teacher")
"""Roles of the models that a step reads; each of them may have a record of its own."""
MADE_ON_THE_WAY = {
    "finetune": ("adapter", "imatrix"),
    "abliterate": ("prompts", "adapter"),
    "distill": ("adapter", "imatrix", ANSWERS),
}
"""By step: the roles of what the step made, or no longer needs; it need not be there to do the step again."""
_TRAINED = ("lora", "loop", *RECORDED_SETTINGS)
_NEEDED = {
    "finetune": _TRAINED,
    "distill": _TRAINED,
    "downsize": ("target", "quant", "lora", "loop", "distill", "max_length", "learn"),
}
"""By step: the parameters without which it cannot be done again."""


def require_repeatable(landing: Landing) -> None:
    """Refuse a record from which its step cannot be done again; whether its sources are there is another question.

    Raises:
        UnsupportedError: a step that is none of `STEPS`, a teacher on a server, or a record that says too little.
    """
    if landing.step not in STEPS or [parent.role for parent in landing.parents].count("base") != 1:
        raise UnsupportedError(
            f"The step {landing.step!r} of {landing.name!r} cannot be made again by `rebuild`",
            why=f"It can repeat {', '.join(STEPS)}.",
            next=_way_of(landing),
        )
    missing = [key for key in _NEEDED.get(landing.step, ()) if key not in landing.parameters]
    if missing:
        raise UnsupportedError(
            f"The record of {landing.name!r} says too little to make it again",
            why=f"An earlier version wrote it, without {', '.join(missing)}.",
            next=_way_of(landing),
        )
    n_processes = landing.parameters.get("processes", 1)
    if n_processes > 1:
        raise UnsupportedError(
            f"{landing.name!r} was trained by {n_processes} processes together, and `rebuild` is a single one",
            why="Each of them read examples of its own at every step.",
            next=f"Train so again with accelerate launch --num_processes {n_processes}. {_way_of(landing)}",
        )
    hosts = landing.parameters.get("ask", {}).get("hosts")
    if hosts:
        teacher = _find(landing, "teacher", "its teacher")
        raise UnsupportedError(
            f"{landing.name!r} was taught by {teacher!r} on {', '.join(hosts)}, which cannot be asked again",
            why="Its model is not on this disk, and nothing says that the server still has the same one.",
            next="Train on the answers that were kept: ollama-forge finetune "
            f"--data {shlex.quote(_find(landing, ANSWERS, 'FILE'))} "
            f"--base {shlex.quote(_find(landing, 'base', 'STUDENT'))} --name NAME",
        )


def _way_of(landing: Landing) -> str:
    """What to type instead: a recipe makes its model again by itself."""
    recipe = _find(landing, "recipe", "")
    if recipe:
        return f"ollama-forge build {recipe} --locked --force"
    return f"Its settings and sources are recorded: ollama-forge registry lineage {landing.name}"


def _find(landing: Landing, role: str, otherwise: str) -> str:
    return next((parent.ref for parent in landing.parents if parent.role == role), otherwise)


def repeat_step(landing: Landing, models: Mapping[str, InstalledModel | Path], options: LandOptions) -> LandedModel:
    """Land what `landing` landed.

    Args:
        models: by role, in the same store or on this disk; a student that is its teacher's own cut has only a base.

    Raises:
        As the job of that step.
        UnsupportedError: a quantization whose importance matrix was not recorded as a file.
    """
    source = models["base"]
    changes = _modelfile(landing.parameters.get("modelfile"))
    if landing.step == "finetune":
        return _finetune(landing, source, changes, options)
    if landing.step == "abliterate":
        return _abliterate(landing, source, changes, options)
    if landing.step == "prune":
        return _prune(landing, source, changes, options)
    if landing.step == "distill":
        return _distill(landing, source, models.get("teacher", source), changes, options)
    if landing.step == "downsize":
        return _downsize(landing, source, changes, options)
    adapters, matrix = _paths(landing, "adapter"), next(iter(_paths(landing, "imatrix")), None)
    if landing.step == "merge":
        return _merge(landing, source, adapters, matrix, changes, options)
    wanted = landing.parameters.get("quantization")
    quantize = None if wanted is None else _quantize_options(wanted, matrix)
    if quantize is not None and isinstance(source, InstalledModel):
        base = resolve(_ref(source), options.store_path)
        return quantize_and_land(base, landing.name, changes, quantize, options)
    with scratch_folder() as scratch:
        if adapters:
            base = resolve(_ref(source), options.store_path)
            adapters = tuple(prepare_adapter(path, base, scratch) for path in adapters)
        if isinstance(source, InstalledModel):
            return land_installed(source, landing.name, changes, options, adapters=adapters)
        if landing.step == "import":
            conversion = _convert_options(landing.parameters.get("conversion") or {}, matrix)
            return import_folder(source, landing.name, changes, options, conversion, adapters=adapters)
        projector = next(iter(_paths(landing, "projector")), None)
        return land_gguf(
            source, landing.name, changes, options, adapters=adapters, quantize=quantize, projector=projector
        )


def _finetune(landing: Landing, source: InstalledModel | Path, changes: Modelfile, options: LandOptions) -> LandedModel:
    with _training(landing, source, changes, options) as request:
        landed = finetune(request, options).landed
    assert landed is not None  # skip_landing is off
    return landed


@contextlib.contextmanager
def _training(
    landing: Landing, base: InstalledModel | Path, changes: Modelfile, options: LandOptions
) -> Iterator[FinetuneRequest]:
    """The training that was recorded, in a folder that goes away again."""
    plain = landing.parameters
    with _work_folder(options) as folder:
        yield FinetuneRequest(
            data=_paths(landing, "data"),
            base=_ref(base),
            name=landing.name,
            folder=folder,
            lora=_lora_options(plain["lora"]),
            loop=LoopOptions(**{**plain["loop"], "report_to": ()}),
            changes=changes,
            base_gguf=next(iter(_paths(landing, TWIN)), None),
            **{key: plain[key] for key in RECORDED_SETTINGS},
        )


@contextlib.contextmanager
def _work_folder(options: LandOptions) -> Iterator[Path]:
    """A working folder on the disk that the result goes to: what training leaves may be as large as the model."""
    with scratch_folder(options.store_path) as scratch:
        yield scratch / "run"


def _distill(
    landing: Landing,
    student: InstalledModel | Path,
    teacher: InstalledModel | Path,
    changes: Modelfile,
    options: LandOptions,
) -> LandedModel:
    """What the teacher wrote is asked for again where it wrote; its predictions always are."""
    plain = landing.parameters
    ask = AskOptions(**{**plain["ask"], "teacher": _ref(teacher)}) if "ask" in plain else None
    with _training(landing, student, changes, options) as training:
        if "options" in plain:
            cut = StudentCut(**plain["cut"]) if plain["cut"] else None
            how = _distill_options(plain["options"])
            request = DistillRequest(training, _ref(teacher), how, plain["quant"], ask=ask, cut=cut)
            landed = distill(request, options).landed
        else:
            assert ask is not None
            trained = distill_text(TextDistillRequest(training, ask), options).training
            landed = trained.landed if trained else None
    assert landed is not None  # skip_landing is off
    return landed


def _downsize(landing: Landing, source: InstalledModel | Path, changes: Modelfile, options: LandOptions) -> LandedModel:
    plain = landing.parameters
    with _work_folder(options) as folder:
        request = PipelineRequest(
            ref=_ref(source),
            name=landing.name,
            goal=parse_goal(plain["target"]),
            folder=folder,
            data=_paths(landing, "data"),
            text=next(iter(_paths(landing, "text")), None),
            quant=plain["quant"],
            lora=_lora_options(plain["lora"]),
            loop=LoopOptions(**plain["loop"]),
            distill=_distill_options(plain["distill"]),
            max_length=plain["max_length"],
            learn=plain["learn"],
            changes=changes,
        )
        landed = downsize(request, options).landed
    assert landed is not None  # not a dry run
    return landed


def _merge(
    landing: Landing,
    source: InstalledModel | Path,
    adapters: tuple[Path, ...],
    matrix: Path | None,
    changes: Modelfile,
    options: LandOptions,
) -> LandedModel:
    weights = landing.parameters["weights"]
    inputs = [MergeInput(path, weight) for path, weight in zip(adapters, weights, strict=True)]
    merging = MergeOptions(untie=landing.parameters["untie"], imatrix=matrix)
    base = resolve(_ref(source), options.store_path)
    return merge_and_land(base, inputs, landing.name, changes, options, merging)[1]


def _abliterate(
    landing: Landing, source: InstalledModel | Path, changes: Modelfile, options: LandOptions
) -> LandedModel:
    directions, matrix = _paths(landing, "directions"), next(iter(_paths(landing, "imatrix")), None)
    if not directions:
        raise UnsupportedError(
            f"{landing.name!r} was abliterated elsewhere, and only landed here",
            next="Land it again: ollama-forge abliterate run --from-checkpoint REF --name NAME",
        )
    model = resolve(_ref(source), options.store_path)
    return repeat_abliteration(model, directions[0], landing.name, changes, landing.parameters, matrix, options)


def _prune(landing: Landing, source: InstalledModel | Path, changes: Modelfile, options: LandOptions) -> LandedModel:
    """The same layers go, without looking; channels and heads are measured again on the same text."""
    plain = landing.parameters
    text = next(iter(_paths(landing, "data")), None)
    wanted = PruneOptions(
        drop=tuple(plain["dropped_layers"]),
        width={name: parse_amount(amount, name) for name, amount in plain["width"].items()},
        by=plain["by"],
        calibration=CalibrationOptions(text, plain["tokens"], plain["context"], plain["seed"]),
    )
    return prune_and_land(resolve(_ref(source), options.store_path), landing.name, changes, options, wanted)[1]


def _ref(source: InstalledModel | Path) -> str:
    return source.name.display if isinstance(source, InstalledModel) else str(source)


def find_source(parent: Parent) -> Path:
    """Where a recorded file or folder lies; one of the Hub comes into its cache first, of the recorded commit.

    Raises:
        HubError, DiskError: as `source.hub`.
    """
    if not parent.commit:
        return Path(parent.ref)
    repo, _, file = parent.ref.removeprefix("hf:").partition(":")
    named = RepoName(repo, parent.commit, file=file)
    if file:
        return fetch_file(named)
    return fetch_adapter_files(named)[1] if parent.role == "adapter" else fetch_model_path(named)


def _paths(landing: Landing, role: str) -> tuple[Path, ...]:
    return tuple(find_source(parent) for parent in landing.parents if parent.role == role)


def _modelfile(text: object) -> Modelfile:
    return replace(parse_modelfile(text), sources=()) if isinstance(text, str) and text else Modelfile()


def _lora_options(plain: Mapping[str, Any]) -> LoraOptions:
    return LoraOptions(**{**plain, "target_modules": tuple(plain["target_modules"])})


def _distill_options(plain: Mapping[str, Any]) -> DistillOptions:
    loss = {**plain["loss"], "divergence": Divergence[plain["loss"]["divergence"]]}
    return DistillOptions(DistillLoss(**loss), OnPolicy(**plain["on_policy"]), plain["is_full"], plain["cached_words"])


def _convert_options(plain: Mapping[str, Any], matrix: Path | None) -> ConvertOptions:
    quantize = plain.get("quantize")
    return ConvertOptions(
        outtype=str(plain.get("outtype", "auto")),
        quantize=None if quantize is None else _quantize_options(quantize, matrix),
        name=plain.get("name"),
    )


def _quantize_options(plain: Mapping[str, Any], matrix: Path | None) -> QuantizeOptions:
    known: dict[str, Any] = {"file_type": FileType[plain["file_type"]]}
    for field in ("output_tensor_type", "token_embedding_type"):
        if plain.get(field) is not None:
            known[field] = GGMLType[plain[field]]
    if plain.get("tensor_types"):
        known["tensor_types"] = tuple((pattern, GGMLType[name]) for pattern, name in plain["tensor_types"])
    for field in ("pure", "leave_output_tensor", "allow_requantize"):
        known[field] = bool(plain.get(field))
    if plain.get("imatrix") is not None:
        if matrix is None:
            raise UnsupportedError(
                "A quantization with an importance matrix cannot be made again by `rebuild`",
                why="The record does not name the matrix's file.",
                next="Quantize again by hand: ollama-forge quantize --imatrix FILE",
            )
        known["imatrix"] = read_imatrix(matrix)
    return QuantizeOptions(**known)
