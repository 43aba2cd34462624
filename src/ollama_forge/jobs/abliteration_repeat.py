"""An abliteration done once more from its record: the same directions taken out of the same model in the same way.

In: what `abliterate apply`, `run` and `optimize` left in the registry. Out: what they landed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.jobs.abliteration import ApplyOptions, ablate_and_land, apply_ablation
from ollama_forge.jobs.conversion import quantize_file, quantize_options
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, land_gguf
from ollama_forge.jobs.merging import inherited
from ollama_forge.jobs.refusal_answers import as_gguf
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.transform.ablation import AblationOptions


def repeat_abliteration(
    model: ResolvedModel,
    directions: Path,
    name: str,
    changes: Modelfile,
    recorded: Mapping[str, Any],
    matrix: Path | None,
    options: LandOptions,
) -> LandedModel:
    """Land it again.

    Args:
        recorded: the parameters of the landing.
        matrix: the importance matrix, where there was one.

    Raises:
        As `jobs.abliteration` and `jobs.landing`.
    """
    wanted = ApplyOptions(
        AblationOptions(**recorded["ablation"]), as_lora=bool(recorded.get("as_lora")), imatrix=matrix
    )
    if "quant" not in recorded:  # of `apply`
        return ablate_and_land(model, directions, name, changes, options, wanted)[1]
    quant = recorded["quant"]
    with as_gguf(model) as source, scratch_folder() as scratch:
        path = scratch / "edited.gguf"
        apply_ablation(source, directions, path, wanted, progress=options.progress)
        if quant is not None:
            smaller = scratch / "quantized.gguf"
            types = quantize_options(quant, imatrix=matrix, allow_requantize=True)
            quantize_file(path, smaller, types, progress=options.progress)
            path = smaller
        return land_gguf(path, name, inherited(model, changes), options, projector=model.projector)
