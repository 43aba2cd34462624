"""A model made smaller and landed: what quantizing a file is, with everything else that the model says kept.

In: a model on this disk and a type. Out: `LandedModel`, with the base's template, parameters, projector and adapters.
"""

from __future__ import annotations

import contextlib

from ollama_forge.errors import UsageError
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.jobs.conversion import open_quantization
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, land_planned
from ollama_forge.jobs.lineage import file_ingredient, ingredient_of, modelfile_text, plain_value, working
from ollama_forge.jobs.merging import inherited
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.modelfile import Modelfile


def quantize_and_land(
    source: ResolvedModel, name: str, changes: Modelfile, quantize: QuantizeOptions, options: LandOptions
) -> LandedModel:
    """Quantized straight into the store, in one pass.

    Raises:
        UsageError: a Hugging Face folder.
        FormatError: it is quantized already, and that was not allowed.
        As `jobs.landing` says.
    """
    path = source.gguf_path
    if path is None:
        raise UsageError(
            f"{source.text!r} is a Hugging Face folder, not a GGUF",
            next=f"ollama-forge import {source.text} --name {name} --quant TYPE",
        )
    with _quantizing(source, changes, quantize):
        return land_planned(
            lambda: open_quantization(path, quantize),
            name,
            inherited(source, changes),
            options,
            adapters=source.adapters,
            projector=source.projector,
        )


def _quantizing(
    source: ResolvedModel, changes: Modelfile, quantize: QuantizeOptions
) -> contextlib.AbstractContextManager[None]:
    """What the registry is told; enough to do it again."""
    sources = [ingredient_of(source)]
    if quantize.imatrix is not None and quantize.imatrix.path is not None:
        sources.append(file_ingredient(quantize.imatrix.path, "imatrix"))
    return working("quantize", sources, quantization=plain_value(quantize), modelfile=modelfile_text(changes))
