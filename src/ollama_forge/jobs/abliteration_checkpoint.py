"""A model that is abliterated already, by whatever tool: asked what it refuses, and landed.

In: any ref, perhaps the model that it was made from, and prompts. Out: a `RefusalReport` and a `LandedModel`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ollama_forge.errors import UsageError
from ollama_forge.jobs.conversion import convert_options, quantize_options
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder, land_gguf, land_installed
from ollama_forge.jobs.lineage import ingredient_of, working
from ollama_forge.jobs.merging import inherited
from ollama_forge.jobs.refusals import EvaluateOptions, OnStep, RefusalReport, evaluate_models
from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.modelfile import Modelfile

DEFAULT_QUANT = "Q4_K_M"


def land_checkpoint(
    checkpoint: str,
    against: str | None,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    *,
    quant: str | None = None,
    evaluate: EvaluateOptions | None = None,
    on_step: OnStep | None = None,
) -> tuple[RefusalReport | None, LandedModel]:
    """Land a model, and ask what was landed, where there are prompts.

    Args:
        against: what it was made from, for the comparison and the record.
        quant: None: a GGUF as it is, a folder as Q4_K_M.

    Raises:
        UsageError: a GGUF of an Ollama model with `quant`.
        As `jobs.landing` and `refusals.evaluate_refusals`.
    """
    model = resolve(checkpoint, options.store_path)
    parent = resolve(against, options.store_path) if against else None
    if model.installed is not None and quant:
        raise UsageError(
            f"{checkpoint!r} is an Ollama model already",
            next=f"To make it smaller: ollama-forge quantize {checkpoint} --name {name} --type {quant}",
        )
    wanted = inherited(model, changes) if parent is None else inherited(parent, changes)
    parents = [ingredient_of(model, "checkpoint"), *([ingredient_of(parent)] if parent else [])]
    with working("abliterate", parents, checkpoint=checkpoint, quant=quant):
        if model.folder is not None:
            conversion = convert_options("auto", quantize_options(quant or DEFAULT_QUANT))
            landed = import_folder(model.folder, name, wanted, options, conversion)
        elif model.installed is not None:
            landed = land_installed(model.installed, name, wanted, options)
        else:
            assert model.gguf_path is not None
            types = quantize_options(quant, allow_requantize=True) if quant else None
            landed = land_gguf(model.gguf_path, name, wanted, options, quantize=types)
    if not harmful or options.dry_run or options.server is not None:
        return None, landed
    shipped = resolve(landed.name, options.store_path)
    report = evaluate_models(shipped, harmful, harmless, parent, evaluate or EvaluateOptions(), on_step)
    return report, landed
