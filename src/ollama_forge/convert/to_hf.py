"""Plan the way back: a GGUF file as a Hugging Face folder, every name, dtype and byte count before a weight is written.

In: an open checkpoint over GGUF, and options. Out: an `HFFolder`, which `write_hf_folder` writes into an empty folder.
Every transform of `convert.plan` is inverted through the same rows, so converting the folder gives the same tensors
again. `auto` keeps what is stored: F16 and BF16 stay, quantized blocks become BF16, and float32 vectors take the type
of the matrices only where not a bit is lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.arch.rows import Family, Residual, Role, TensorAddress
from ollama_forge.convert.hf_files import render_card, render_config, render_generation
from ollama_forge.convert.hf_tensors import HFTensor
from ollama_forge.errors import GGUFError, UnsupportedError, UsageError
from ollama_forge.files import Advance, write_bytes
from ollama_forge.gguf.native import can_dequantize
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import GGMLType, file_type_name
from ollama_forge.tokenizer.to_hf import plan_tokenizer_files
from ollama_forge.weights.checkpoint import Checkpoint, StoredTensor
from ollama_forge.weights.safetensors_writer import DEFAULT_SHARD_BYTES, ShardPlan, plan_shards, write_shards

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""The words of --dtype beside `auto`."""

OTHER_MODALITIES = ("v.", "a.", "mm.")  # pictures and sound in the files that Ollama itself converts
_KEPT = {GGMLType.F16: "F16", GGMLType.BF16: "BF16"}
_ATTENTION = (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE)
_FEED_FORWARD = (Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN)

# Which setting of transformers gives these matrices a bias; an empty one: the family always has it.
_BIASES: Mapping[str, Mapping[str, tuple[Role, ...]]] = {
    "llama": {"attention_bias": (*_ATTENTION, Role.ATTENTION_OUTPUT), "mlp_bias": _FEED_FORWARD},
    "qwen2": {"": _ATTENTION},
    "qwen3": {"attention_bias": (*_ATTENTION, Role.ATTENTION_OUTPUT)},
    "qwen3_moe": {"attention_bias": (*_ATTENTION, Role.ATTENTION_OUTPUT)},
    "gemma2": {"attention_bias": (*_ATTENTION, Role.ATTENTION_OUTPUT)},
    "gemma3_text": {"attention_bias": (*_ATTENTION, Role.ATTENTION_OUTPUT)},
    "phi3": {},
}


@dataclass(frozen=True)
class HFOptions:
    """What the user asked for.

    Attributes:
        dtype: `auto`, `f32`, `f16` or `bf16`.
        max_shard_bytes: where a file ends and the next begins.
        n_threads: the usable cores by default.
    """

    dtype: str = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    n_threads: int | None = None


@dataclass(frozen=True)
class HFFolder:
    """A folder that is decided but not yet written; the checkpoint stays open until it is.

    Attributes:
        files: the small ones, by name.
        dtype: of most weights.
        dtypes: how many tensors have each.
        skipped: tensors for pictures or sound, which a text model has no place for.
        warnings: one sentence each.
    """

    family: Family
    files: Mapping[str, bytes]
    shards: ShardPlan
    dtype: str
    dtypes: Mapping[str, int]
    n_parameters: int
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Exact size of all files together."""
        return self.shards.size_bytes + sum(len(content) for content in self.files.values())

    @property
    def filenames(self) -> tuple[str, ...]:
        return tuple(sorted((*self.files, *self.shards.filenames)))


def plan_hf_folder(checkpoint: Checkpoint, options: HFOptions | None = None) -> HFFolder:
    """Decide everything about a folder. Headers are read, and float32 vectors to see whether they fit a smaller type.

    Args:
        checkpoint: of a GGUF file.

    Raises:
        UsageError: an unknown dtype, or a checkpoint that is a folder already.
        UnsupportedError: a tensor that the family does not know, or that transformers has no place for.
        GGUFError: tensors are missing or do not fit the metadata.
        TokenizerError: the vocabulary is missing, or it is of a kind that is not known.
    """
    options = options or HFOptions()
    source = checkpoint.gguf
    if source is None:
        raise UsageError(f"{str(checkpoint.path)!r} is a Hugging Face folder already", next="Copy it: cp -r")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {options.dtype!r}", why=f"Known: auto, {', '.join(DTYPES)}.")
    skipped = _require_fitting(checkpoint, source)
    config = {**checkpoint.hf_config, **_bias_settings(checkpoint)}
    stored = [tensor for tensor in checkpoint.tensors.values() if tensor.row.hf_name]
    target = DTYPES.get(options.dtype) or _main_dtype(stored)
    tensors = [_plan_tensor(checkpoint, tensor, target, options) for tensor in stored]
    tokenizer = plan_tokenizer_files(source.metadata, checkpoint.config.find("max_position_embeddings", "n_positions"))
    files = {
        "config.json": render_config(config, checkpoint.family, target),
        "generation_config.json": render_generation(source.metadata),
        "README.md": render_card(source.metadata, _file_type(source)),
        **tokenizer.files,
    }
    warnings = list(tokenizer.warnings)
    if skipped:
        warnings.append(f"{len(skipped)} tensors for pictures or sound were left out: the folder is the text model.")
    return HFFolder(
        family=checkpoint.family,
        files=files,
        shards=plan_shards([tensor.entry() for tensor in tensors], options.max_shard_bytes),
        dtype=target,
        dtypes=dict(Counter(tensor.dtype for tensor in tensors).most_common()),
        n_parameters=sum(math.prod(tensor.stored.spec.shape) for tensor in tensors),
        skipped=skipped,
        warnings=tuple(warnings),
    )


def write_hf_folder(plan: HFFolder, folder: Path, advance: Advance | None = None) -> None:
    """Write a planned folder into an empty one.

    Raises:
        GGUFError: a number that the dtype cannot hold.
        DiskError: no room, or the system refused.
    """
    for name, content in plan.files.items():
        write_bytes(folder / name, content)
        if advance:
            advance(len(content))
    write_shards(plan.shards, folder, advance)


def _plan_tensor(checkpoint: Checkpoint, stored: StoredTensor, target: str, options: HFOptions) -> HFTensor:
    tensor = HFTensor(checkpoint, stored, "F32", options.n_threads)
    if not can_dequantize(tensor.type):
        raise UnsupportedError(
            f"{stored.gguf_name!r} is {tensor.type.name}, which cannot be decoded here",
            why="A Hugging Face folder holds plain numbers.",
            next="Export a GGUF of the same model in another quantization.",
        )
    dtype = target
    if options.dtype == "auto":
        dtype = _KEPT.get(tensor.type, target)
        if tensor.type is GGMLType.F32 and target != "F32" and not tensor.fits(target):
            dtype = "F32"
    return HFTensor(checkpoint, stored, dtype, options.n_threads)


def _main_dtype(stored: list[StoredTensor]) -> str:
    """The type of most weights of the matrices: quantized ones count as BF16."""
    weights: Counter[str] = Counter()
    for tensor in stored:
        if len(tensor.spec.shape) > 1 and isinstance(tensor.spec.encoding, GGMLType):
            word = {GGMLType.F32: "F32", GGMLType.F16: "F16"}.get(tensor.spec.encoding, "BF16")
            weights[word] += math.prod(tensor.spec.shape)
    return weights.most_common(1)[0][0] if weights else "F32"


def _require_fitting(checkpoint: Checkpoint, source: GGUFFile) -> tuple[str, ...]:
    """Every tensor has its place and every place its tensor; gives the names that belong to other modalities."""
    family, config = checkpoint.family, checkpoint.config
    skipped = []
    for name, tensor in source.tensors.items():
        if name.startswith(OTHER_MODALITIES):
            skipped.append(name)
            continue
        address = family.address_by_gguf_name(name)
        if address is None:
            raise UnsupportedError(
                f"The {family.name} family has no tensor {name!r}",
                why="Leaving it out would give a model that answers differently.",
                next=f"The model can still be exported as it is: ollama-forge export {source.path} -o model.gguf",
            )
        if address.layer is not None and address.layer >= config.n_layers:
            raise _mismatch(source, f"{name!r} belongs to layer {address.layer} of {config.n_layers}")
        row = address.row
        runs_along = row.residual is not Residual.NONE and len(tensor.shape) >= (1 if row.is_bias else 2)
        if runs_along and tensor.shape[row.residual_axis] != config.hidden_size:
            raise _mismatch(
                source, f"{name!r} has the shape {tensor.shape}, and the model is {config.hidden_size} wide"
            )
    missing = next((name for name in _required(checkpoint) if name not in source.tensors), None)
    if missing is not None:
        raise _mismatch(source, f"{missing!r} is missing")
    n_tokens = checkpoint.hf_config["vocab_size"]
    if (rows := source.find_tensor("token_embd.weight").shape[0]) != n_tokens:
        raise _mismatch(source, f"the embedding has {rows:,} rows for {n_tokens:,} tokens")
    return tuple(skipped)


def _required(checkpoint: Checkpoint) -> Iterator[str]:
    for row in checkpoint.family.tensors:
        if not row.is_optional:
            for layer in range(checkpoint.config.n_layers) if row.is_per_layer else (None,):
                yield TensorAddress(row, layer).gguf_name


def _mismatch(source: GGUFFile, what: str) -> GGUFError:
    return GGUFError(
        f"{str(source.path)!r} does not hold together: {what}",
        why="Its tensors and its metadata describe different models.",
        next="Get the file again: ollama pull NAME, or download it from where it came.",
    )


def _bias_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings for the biases that are there. transformers has all of a group in all layers, or none."""
    family = checkpoint.family
    if family.name not in _BIASES:
        return {}
    present = {(key.role, key.layer) for key in checkpoint.tensors if key.is_bias}
    settings: dict[str, Any] = {}
    for setting, roles in _BIASES[family.name].items():
        group = {(role, layer) for role in roles for layer in range(checkpoint.config.n_layers)}
        if setting == "" or group & present:
            if missing := group - present:
                role, layer = min(missing, key=lambda place: (place[1], place[0].value))
                raise UnsupportedError(
                    f"The {role.value} of layer {layer} has no bias, and others of this {family.name} model have one",
                    why="transformers' class for this family adds a bias to all of them or to none.",
                    next="Use the model as GGUF.",
                )
            settings |= {setting: True} if setting else {}
        present -= group
    if present:
        found = min(present, key=lambda place: (place[1] or 0, place[0].value))
        raise UnsupportedError(
            f"The {found[0].value} of layer {found[1]} has a bias; transformers' {family.name} class has none there",
            why="Leaving it out would give a model that answers differently.",
            next="Use the model as GGUF.",
        )
    return settings


def _file_type(source: GGUFFile) -> str:
    number = source.metadata.get("general.file_type")
    return file_type_name(number) if isinstance(number, int) else "unknown"
