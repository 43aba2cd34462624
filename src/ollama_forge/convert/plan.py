"""Plan the conversion of a Hugging Face folder to GGUF: every name, type and byte count, before a weight is read.

In: a folder and options. Out: a `Conversion`, which the caller writes with `gguf.writer.write_gguf`. One pass: when a
quantization is asked for, each tensor goes through the 16-bit type that `auto` would have given it and is quantized at
once, so the bytes equal those of converting first and quantizing the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ollama_forge.arch.config import ModelConfig, hyper_fields, parse_config, warnings_of
from ollama_forge.arch.families import find_family
from ollama_forge.arch.rows import Family, Role
from ollama_forge.convert.card import ParameterCount, general_fields
from ollama_forge.convert.rows import Recipe
from ollama_forge.convert.tensors import OUTTYPES, PlannedTensor, auto_outtype, plan_tensors
from ollama_forge.errors import SafetensorsError, UsageError
from ollama_forge.gguf.mixture import Choice, plan_choices
from ollama_forge.gguf.quantize import (
    QUANTIZATION_VERSION,
    QuantizeOptions,
    find_importance,
    quantization_fields,
    quantized_entry,
)
from ollama_forge.gguf.types import FileType, GGMLType
from ollama_forge.gguf.writer import Field, TensorEntry, plan_layout, string, uint32
from ollama_forge.tokenizer.vocab import Vocabulary, read_vocabulary, vocabulary_fields
from ollama_forge.weights.decode import find_scales
from ollama_forge.weights.folder import read_config
from ollama_forge.weights.safetensors import SafetensorsFolder, open_safetensors


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asked for.

    Attributes:
        outtype: `auto`, `f32`, `f16`, `bf16` or `q8_0`; with `quantize`, what the tensors are rounded to before.
        quantize: quantize in the same pass.
        name: `general.name`; None takes what the model card or the folder says.
        n_threads: the usable cores by default.
    """

    outtype: str = "auto"
    quantize: QuantizeOptions | None = None
    name: str | None = None
    n_threads: int | None = None


@dataclass(frozen=True)
class Conversion:
    """A conversion that is decided but not yet computed: give `fields` and `entries` to `write_gguf`.

    Close it (or use it as a context manager) when the file is written: until then the checkpoint stays mapped.

    Attributes:
        size_bytes: exact size of the GGUF file.
        types: by tensor name.
        outtype: what `auto` came to.
        warnings: what GGUF cannot say, or what was left out; one sentence each.
        skipped: tensors of other modalities that have no place in a text model.
    """

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    size_bytes: int
    family: Family
    config: ModelConfig
    vocabulary: Vocabulary
    types: Mapping[str, GGMLType]
    outtype: str
    file_type: FileType
    n_parameters: int
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    checkpoint: SafetensorsFolder

    def __enter__(self) -> Conversion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the checkpoint's files back."""
        self.checkpoint.close()

    @property
    def summary(self) -> dict[str, Any]:
        """What a command tells about it."""
        return {
            "family": self.family.name,
            "architecture": self.family.gguf_architecture,
            "parameters": self.n_parameters,
            "tensors": len(self.entries),
            "outtype": self.outtype,
            "file_type": int(self.file_type),
            "bytes": self.size_bytes,
        }


def plan_conversion(folder: Path, options: ConvertOptions | None = None) -> Conversion:
    """Decide everything about a conversion; only headers, the tokenizer and the configuration are read.

    Args:
        folder: a Hugging Face model: config.json, safetensors, tokenizer.

    Raises:
        UnsupportedError: a family, a dtype or a packing that is not known; it lists what is.
        NotFoundError: a file is missing.
        FormatError: a file is broken, or the files do not belong together (SafetensorsError, TokenizerError, ...).
        UnsafeFileError: only pickles, or a file that leads out of the folder.
        UsageError: an unknown outtype, or options that do not fit the model.
    """
    options = options or ConvertOptions()
    folder = Path(folder)
    _check_options(options)
    raw = read_config(folder)
    family = find_family(raw)
    config = parse_config(family, raw)
    checkpoint = open_safetensors(folder)
    try:
        return _plan(folder, options, family, config, raw, checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _plan(
    folder: Path,
    options: ConvertOptions,
    family: Family,
    config: ModelConfig,
    raw: Mapping[str, Any],
    checkpoint: SafetensorsFolder,
) -> Conversion:
    outtype = auto_outtype(family, checkpoint.tensors) if options.outtype == "auto" else options.outtype
    vocabulary = read_vocabulary(folder, raw, config.values.get("vocab_size"))
    scales = find_scales(config.values.get("quantization_config"), checkpoint.tensors)
    n_rows = len(vocabulary.tokens) if family.trims_vocabulary else None
    planned = plan_tensors(family, config, checkpoint.tensors, scales, outtype, n_rows)
    _check_vocabulary(planned, vocabulary)
    parameters = count_parameters(planned)
    general, card_warnings = general_fields(folder, raw, parameters, options.name)
    file_type = OUTTYPES[outtype][1]
    fields = [
        string("general.architecture", family.gguf_architecture),
        *general,
        *hyper_fields(family, config),
        uint32("general.file_type", int(file_type)),
        uint32("general.quantization_version", QUANTIZATION_VERSION),
        *vocabulary_fields(vocabulary),
    ]
    types = {tensor.gguf_name: tensor.type for tensor in planned}
    choices: list[Choice] = []
    if options.quantize is not None:
        file_type = options.quantize.file_type
        choices = _choose_types(family, fields, planned, options.quantize)
        types = {choice.name: choice.type for choice in choices}
        replacing = quantization_fields(options.quantize)
        fields = [entry for entry in fields if entry.key not in {other.key for other in replacing}] + replacing
    entries = [_entry(checkpoint, config, tensor, types[tensor.gguf_name], options) for tensor in planned]
    skipped = tuple(name for name in checkpoint.tensors if family.is_other_modality(name))
    warnings = [*warnings_of(family, config), *card_warnings, *fallback_warnings(choices)]
    if skipped:
        warnings.append(f"{len(skipped)} tensors for pictures or sound were left out: GGUF has a second file for them.")
    return Conversion(
        fields=tuple(fields),
        entries=tuple(entries),
        size_bytes=plan_layout(fields, entries).size_bytes,
        family=family,
        config=config,
        vocabulary=vocabulary,
        types=types,
        outtype=outtype,
        file_type=file_type,
        n_parameters=parameters.total,
        warnings=tuple(warnings),
        skipped=skipped,
        checkpoint=checkpoint,
    )


def count_parameters(planned: Sequence[PlannedTensor]) -> ParameterCount:
    """Numbers of parameters as llama.cpp counts them for the size in a model's name."""
    total = shared = per_expert = experts = n_stacks = 0
    for tensor in planned:
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.gguf_name and len(tensor.shape) >= 3:
            per_expert += size // tensor.shape[-3]
            experts += tensor.shape[-3]
            n_stacks += 1
        else:
            shared += size
    return ParameterCount(total, shared, per_expert, experts // n_stacks if n_stacks else 0)


def _entry(
    checkpoint: SafetensorsFolder,
    config: ModelConfig,
    tensor: PlannedTensor,
    target: GGMLType,
    options: ConvertOptions,
) -> TensorEntry:
    if not tensor.pieces:
        return _computed_entry(tensor)
    recipe = Recipe(
        checkpoint, tensor.gguf_name, tensor.type, tensor.pieces, tensor.row.transform, config, options.n_threads
    )
    if target is tensor.type or options.quantize is None:
        return TensorEntry(tensor.gguf_name, tensor.shape, tensor.type, recipe.chunks)
    return quantized_entry(
        tensor.gguf_name,
        tensor.shape,
        tensor.type,
        recipe.read_rows,
        target,
        importance=find_importance(options.quantize.imatrix, tensor.gguf_name, tensor.shape),
        n_threads=options.quantize.n_threads or options.n_threads,
        release=recipe.release,
    )


def _computed_entry(tensor: PlannedTensor) -> TensorEntry:
    import numpy as np

    content = np.array(tensor.values, dtype="<f4").tobytes()
    return TensorEntry(tensor.gguf_name, tensor.shape, tensor.type, lambda: [content])


def _choose_types(
    family: Family, fields: Sequence[Field], planned: Sequence[PlannedTensor], options: QuantizeOptions
) -> list[Choice]:
    known = {entry.key: entry.value for entry in fields}
    rows = [(tensor.gguf_name, tensor.shape, tensor.type) for tensor in planned]
    return list(plan_choices(family.gguf_architecture, known.get, rows, options))


def fallback_warnings(choices: Sequence[Choice]) -> list[str]:
    """A sentence about tensors whose rows do not divide into the blocks of the chosen type."""
    fallbacks = [choice for choice in choices if choice.is_fallback]
    if not fallbacks:
        return []
    first = fallbacks[0]
    return [
        f"{len(fallbacks)} of {len(choices)} tensors have rows that do not divide into the blocks of the chosen type: "
        f"{first.name!r} becomes {first.type.name} instead of {first.wanted.name}."
    ]


def _check_options(options: ConvertOptions) -> None:
    known = ["auto", *OUTTYPES]
    if options.outtype not in known:
        raise UsageError(
            f"Unknown outtype {options.outtype!r}",
            why=f"Known: {', '.join(known)}.",
            next="For smaller types add --quant, for example --quant Q4_K_M.",
        )
    if options.quantize is not None and options.outtype == "q8_0":
        raise UsageError(
            "--outtype q8_0 and --quant do not go together",
            why="The model would be quantized twice.",
            next="Leave --outtype out.",
        )


def _check_vocabulary(planned: Sequence[PlannedTensor], vocabulary: Vocabulary) -> None:
    embedding = next(tensor for tensor in planned if tensor.row.role is Role.TOKEN_EMBEDDING)
    if embedding.shape[0] != len(vocabulary.tokens):
        raise SafetensorsError(
            f"The embedding has {embedding.shape[0]:,} rows, and the model has {len(vocabulary.tokens):,} tokens",
            why="vocab_size in config.json should be the number of rows.",
            next=f"Set vocab_size to {embedding.shape[0]} in config.json, or download the model again.",
        )
