"""Each recorded step, done once more: import, quantize, create, merge, finetune, abliterate, prune.

In: a `Landing` and its base, in place. Out: what it lands, in the store that the options name. The parameters are those
that `jobs.lineage.working` was given when the step was done first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
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
from ollama_forge.registry.document import Landing, Parent
from ollama_forge.source.hub_files import RepoName
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.modelfile import Modelfile, parse_modelfile
from ollama_forge.train.options import LoopOptions, LoraOptions
from ollama_forge.transform.cut_request import parse_amount

STEPS = ("import", "quantize", "create", "merge", "finetune", "abliterate", "prune")
MADE_ON_THE_WAY = {"finetune": ("adapter", "imatrix"), "abliterate": ("prompts", "adapter")}
"""By step: the roles of what the step made, or no longer needs; it need not be there to do the step again."""


def repeat_step(landing: Landing, source: InstalledModel | Path, options: LandOptions) -> LandedModel:
    """Land what `landing` landed.

    Args:
        source: the base, in the same store or on this disk.

    Raises:
        As the job of that step.
        UnsupportedError: a quantization whose importance matrix was not recorded as a file.
    """
    changes = _modelfile(landing.parameters.get("modelfile"))
    if landing.step == "finetune":
        return _finetune(landing, source, changes, options)
    if landing.step == "abliterate":
        return _abliterate(landing, source, changes, options)
    if landing.step == "prune":
        return _prune(landing, source, changes, options)
    adapters, matrix = _paths(landing, "adapter"), next(iter(_paths(landing, "imatrix")), None)
    if landing.step == "merge":
        return _merge(landing, source, adapters, matrix, changes, options)
    wanted = landing.parameters.get("quantization")
    quantize = None if wanted is None else _quantize_options(wanted, matrix)
    if quantize is not None and isinstance(source, InstalledModel):
        base = resolve(_ref(source), options.store_path)
        return quantize_and_land(base, landing.name, changes, quantize, options)
    with tempfile.TemporaryDirectory(prefix="ollama-forge-") as scratch:
        if adapters:
            base = resolve(_ref(source), options.store_path)
            adapters = tuple(prepare_adapter(path, base, Path(scratch)) for path in adapters)
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
    plain = landing.parameters
    with tempfile.TemporaryDirectory(prefix="ollama-forge-") as scratch:
        request = FinetuneRequest(
            data=_paths(landing, "data"),
            base=_ref(source),
            name=landing.name,
            folder=Path(scratch) / "run",
            lora=LoraOptions(**{**plain["lora"], "target_modules": tuple(plain["lora"]["target_modules"])}),
            loop=LoopOptions(**{**plain["loop"], "report_to": ()}),
            changes=changes,
            base_gguf=next(iter(_paths(landing, TWIN)), None),
            **{key: plain[key] for key in RECORDED_SETTINGS},
        )
        landed = finetune(request, options).landed
    assert landed is not None  # skip_landing is off
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
