"""Everything about a fine-tune that can be checked before it starts: base, data, names, folder, sums.

In: a `FinetuneRequest`. Out: a `PreparedRun`, or an error before any work.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.examples import Example, hash_examples
from ollama_forge.dataset.pack import pack_rows
from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.render import NOTES, RenderOptions
from ollama_forge.dataset.tokenize import Tokenized, TokenizedDataset, split_examples, tokenize_examples
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.errors import MissingExtraError, TrainingError, UnsupportedError
from ollama_forge.files import is_same_disk, make_folder
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.jobs.conversion import convert_folder
from ollama_forge.jobs.land_options import LandOptions, require_landable
from ollama_forge.jobs.lineage import weights_digest
from ollama_forge.jobs.resolve import ResolvedModel, resolve, resolve_gguf
from ollama_forge.jobs.run_folder import claim_folder, name_after
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.jobs.training_disk import FLOAT_BYTES, TrainingDisk
from ollama_forge.jobs.training_plan import TrainingPlan, plan_training
from ollama_forge.store.catalog import open_store
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.options import LOGGERS, LoopOptions, LoraOptions, settle
from ollama_forge.train.targets import linear_layers, require_targets

TRAIN_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets")


@dataclass(frozen=True)
class FinetuneRequest:
    """What to train, on what, and what becomes of it.

    Attributes:
        data: files and folders of training examples.
        include: file patterns that are taken from folders beside `*.jsonl`.
        base: any model: an Ollama name, a GGUF, a Hugging Face folder.
        name: the Ollama model to make; None (with `skip_landing`) keeps only the adapter.
        validation_share: of the examples, held back to judge by.
        learn: `assistant` turns only, or `all`.
        overlong: what happens to rows beyond `max_length`: `truncate` or `drop`.
        folder: where checkpoints, the adapter and the report go.
        merge: land a merged model instead of the base with an adapter layer.
        base_gguf: train on this GGUF of the same model instead; the result is landed on `base` all the same.
    """

    data: tuple[Path, ...]
    base: str
    name: str | None
    folder: Path
    lora: LoraOptions = field(default_factory=LoraOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    include: tuple[str, ...] = ()
    max_length: int = 1024
    overlong: str = "truncate"
    learn: str = "assistant"
    validation_share: float = 0.0
    merge: bool = False
    skip_landing: bool = False
    resume: bool = False
    changes: Modelfile = field(default_factory=Modelfile)
    base_gguf: Path | None = None


@dataclass(frozen=True)
class PreparedRun:
    """What training needs, checked. `gguf` is what is trained on, `model` what the result is landed on; `origin` is the
    base as it was named, before a folder became a GGUF."""

    origin: ResolvedModel
    model: ResolvedModel
    gguf: GGUFFile
    chat_format: ChatFormat
    examples: tuple[Example, ...]
    held: tuple[Example, ...]
    train: TokenizedDataset
    validation: TokenizedDataset | None
    loop: LoopOptions
    plan: TrainingPlan
    data_warnings: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know of the data and the plan."""
        return (*self.data_warnings, *self.plan.warnings)


@contextlib.contextmanager
def prepare_run(request: FinetuneRequest, options: LandOptions) -> Iterator[PreparedRun]:
    """Check all there is to check; a folder of Hugging Face becomes a GGUF, of a dry run in a place that goes away.

    Raises:
        TrainingError, UnsupportedError: a base that cannot be trained.
        DatasetError, TemplateError: data that cannot be used.
    """
    with contextlib.ExitStack() as scratch:
        place = request.folder
        if options.dry_run:
            place = scratch.enter_context(scratch_folder())
        yield scratch.enter_context(_prepared(request, options, place))


@contextlib.contextmanager
def _prepared(request: FinetuneRequest, options: LandOptions, place: Path) -> Iterator[PreparedRun]:
    origin = resolve(request.base, options.store_path)
    dataset = read_dataset(find_data_files(request.data, request.include))
    examples, held = split_examples(dataset.examples, request.validation_share, request.loop.seed)
    if origin.folder is not None and request.lora.target_modules:
        _require_targets(origin.folder, request.lora)
    model = as_trainable(origin, place, options)
    assert model.gguf_path is not None
    source = model.gguf_path if request.base_gguf is None else twin_of(model, request.base_gguf, options)
    render = RenderOptions(learn=request.learn)
    with open_gguf(source) as gguf:
        require_trainable(gguf, request.base)
        chat_format = chat_format_of(gguf.metadata)
        train = tokenize_examples(
            examples, chat_format, max_length=request.max_length, options=render, overlong=request.overlong
        )
        validation = (
            tokenize_examples(
                held, chat_format, max_length=request.max_length, options=render, overlong=request.overlong
            )
            if held
            else None
        )
        _refuse_packing(gguf, request, [*train.rows, *(validation.rows if validation else ())])
        loop = settle(request.loop, len(pack_rows(train.rows, request.loop.packed_length)))
        plan = plan_training(request.base, gguf, train, validation, request.lora, loop, request.folder)
        plan = replace(plan, disk=_with_landing(plan, request, options, origin, model))
        warnings = _data_warnings(dataset.warnings, train, request)
        yield PreparedRun(origin, model, gguf, chat_format, examples, held, train, validation, loop, plan, warnings)


def _refuse_packing(gguf: GGUFFile, request: FinetuneRequest, rows: Sequence[Tokenized]) -> None:
    """Refuse to pack where an example would be read otherwise than alone.

    Raises:
        UnsupportedError: rotary factors that change with the longest position in a row, and an example that is so long.
    """
    limit = gguf.arch_value("rope.scaling.original_context_length", 0)
    longest = max(len(row.input_ids) for row in rows)
    if request.loop.packed_length and "rope_factors_long.weight" in gguf.tensors and longest > limit:
        raise UnsupportedError(
            f"Examples for {request.base!r} ({gguf.architecture}) cannot be packed: one has {longest:,} tokens",
            why=f"Beyond {limit:,} tokens this model turns its positions by other factors, and short examples in the "
            "same row would be turned by them, too.",
            next=f"Leave --packing out, or keep examples short: --max-length {limit}",
        )


def _with_landing(
    plan: TrainingPlan, request: FinetuneRequest, options: LandOptions, origin: ResolvedModel, model: ResolvedModel
) -> TrainingDisk:
    """What landing adds: an adapter layer, and of the base what the store does not have and cannot share."""
    disk = plan.disk
    assert model.gguf_path is not None
    base, base_bytes = model.gguf_path, model.gguf_path.stat().st_size
    if origin.folder is not None:
        base = disk.folder
        if options.dry_run:
            disk = replace(disk, result_bytes=disk.result_bytes + base_bytes)  # it is not converted yet
    if request.skip_landing or options.server is not None:
        return disk
    store = open_store(options.store_path).models_dir
    if request.merge:
        return replace(disk, store=store, landing_bytes=base_bytes)
    added = 0 if is_same_disk(store, disk.folder) else plan.n_trained_parameters * FLOAT_BYTES
    if model.installed is None and not is_same_disk(store, base):
        added += base_bytes
    return replace(disk, store=store, landing_bytes=added)


def _require_targets(folder: Path, lora: LoraOptions) -> None:
    """Before a folder is converted, which takes a while; of a GGUF the plan finds out."""
    with plan_conversion(folder, ConvertOptions()) as conversion:
        layers = linear_layers(conversion.family, {entry.name: entry.shape for entry in conversion.entries})
        require_targets([layer.name for layer in layers], lora.target_modules)


def as_trainable(model: ResolvedModel, folder: Path, options: LandOptions) -> ResolvedModel:
    """The base as a GGUF; a Hugging Face folder is converted once, to 16 bits, into the working folder.

    Raises:
        UnsupportedError: an Ollama model that has adapters already.
    """
    if model.adapters:
        raise UnsupportedError(
            f"{model.text!r} has an adapter already",
            why="Training starts from plain weights.",
            next=f"Merge it first: ollama-forge merge {model.text} -o merged.gguf; "
            "then train with --base ./merged.gguf",
        )
    if model.folder is None:
        return model
    converted = folder / name_after("base", model.folder.absolute())
    if not converted.exists():
        make_folder(folder)
        convert_folder(model.folder, converted, ConvertOptions(), progress=options.progress)
    return replace(model, gguf_path=converted, folder=None)


def twin_of(model: ResolvedModel, base_gguf: Path, options: LandOptions) -> Path:
    """`base_gguf`, after a look whether what is trained on it can be landed on `model`.

    Raises:
        TrainingError: their tensors differ in shape, or it is of another family.
    """
    path = resolve_gguf(str(base_gguf), options.store_path)
    assert model.gguf_path is not None
    with open_gguf(path) as source, open_gguf(model.gguf_path) as target:
        differing = [
            name
            for name, tensor in source.tensors.items()
            if len(tensor.shape) > 1 and (name not in target.tensors or target.tensors[name].shape != tensor.shape)
        ]
        if source.architecture != target.architecture or differing:
            why = f"{differing[0]!r} is not the same in both." if differing else "They are of two families."
            raise TrainingError(
                f"--base-gguf {str(base_gguf)!r} is not the model {model.text!r} in another quantization",
                why=f"{why} What is trained on one would not fit the other.",
                next=f"Give a GGUF of {model.text!r}, or leave --base-gguf out: training then uses the model itself.",
            )
    return path


def require_trainable(gguf: GGUFFile, base: str) -> None:
    """Refuse what is no language model.

    Raises:
        TrainingError: an embedding model, an adapter or a projector.
    """
    if gguf.arch_value("pooling_type") is not None or gguf.metadata.get("general.type", "model") != "model":
        raise TrainingError(
            f"{base!r} is not a model that answers",
            why=f"Its header says {gguf.metadata.get('general.type', 'embedding model')!r}, architecture "
            f"{gguf.architecture!r}.",
            next="Choose a chat or base model: ollama-forge list",
        )


def require_free_name(request: FinetuneRequest, options: LandOptions) -> None:
    if request.name is None:
        if not request.skip_landing:
            raise TrainingError(
                "No name for the result", next="Add --name NAME, or --skip-retrain for the adapter alone."
            )
        return
    require_landable(request.name, replace(options, overwrite=options.overwrite or request.skip_landing))


def missing_train_packages() -> list[str]:
    """What the training extra still lacks here."""
    return [name for name in TRAIN_PACKAGES if not importlib.util.find_spec(name)]


def require_extra(loop: LoopOptions | None = None) -> None:
    """Refuse what this machine or the packages on it cannot do.

    Raises:
        MissingExtraError: training's extra, or the package of a logger, is not installed.
        UsageError: the device that was asked for is not here.
    """
    for name in loop.report_to if loop else ():
        packages = LOGGERS[name]
        if not any(map(importlib.util.find_spec, packages)):
            raise MissingExtraError(
                f"--report-to {name} needs the package {packages[0]}, which is not installed",
                next=f"pip install {packages[0]}   (or leave --report-to out)",
            )
    missing = missing_train_packages()
    if missing:
        raise MissingExtraError(f"Training needs {', '.join(missing)}", next="pip install 'ollama-forge[train]'")
    if loop is not None and loop.device == "cuda":
        from ollama_forge.train.device import require_device

        require_device(loop.device)


def claim_run(request: FinetuneRequest, prepared: PreparedRun) -> None:
    """Take the working folder for this run.

    Raises:
        ExistsError: there is another run in it, or this one and it is not to be resumed.
    """
    asked = {
        "base": weights_digest(prepared.gguf.path),
        "data": hash_examples(prepared.examples),
        "validation": hash_examples(prepared.held),
        "lora": asdict(request.lora),
        "loop": asdict(prepared.loop),
        "max_length": request.max_length,
        "overlong": request.overlong,
        "learn": request.learn,
    }
    claim_folder(request.folder, asked, is_resumed=request.resume)


def _examples(count: int) -> str:
    return "example" if count == 1 else "examples"


def _data_warnings(
    read_warnings: Mapping[str, int], train: TokenizedDataset, request: FinetuneRequest
) -> tuple[str, ...]:
    warnings = [f"{count:,} {_examples(count)}: {kind}" for kind, count in read_warnings.items()]
    if train.n_truncated:
        warnings.append(
            f"{train.n_truncated:,} of {len(train.rows):,} examples are cut at {request.max_length} tokens "
            f"(the longest has {train.longest:,}): raise --max-length to keep them whole."
        )
    warnings += [f"{count:,} {_examples(count)} left out: {kind}" for kind, count in train.dropped.items()]
    warnings += [f"{count:,} {_examples(count)}: {NOTES[note]}" for note, count in train.notes.items()]
    return tuple(warnings)
