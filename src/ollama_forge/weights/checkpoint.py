"""One view over a model at rest, a GGUF file or a Hugging Face folder: tensors addressed by what they do.

In: a path. Out: a `Checkpoint`: family, configuration, chat template, and lazy tensors by role, layer and expert. Each
expert's matrix is one tensor here, whether the file stacks experts or not. Nothing is copied until it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.arch import layout
from ollama_forge.arch.config import ModelConfig, config_from_gguf, parse_config
from ollama_forge.arch.families import find_family, find_family_by_gguf
from ollama_forge.arch.rows import Family, Role, TensorAddress, TensorRow
from ollama_forge.errors import GGUFError, NotFoundError, SafetensorsError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.tokenizer.folder import read_tokenizer_folder
from ollama_forge.tokenizer.special import read_templates
from ollama_forge.weights.decode import Scale, decode, find_scales, scale_rows
from ollama_forge.weights.folder import read_config
from ollama_forge.weights.safetensors import SafetensorsFolder, open_safetensors
from ollama_forge.weights.tensor import TensorSpec

Floats = NDArray[np.float32]

_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Layout(Enum):
    """In which order the numbers are given: as the file has them, as GGUF has them, or as transformers has them."""

    STORED = "stored"
    GGUF = "gguf"
    HF = "hf"


@dataclass(frozen=True)
class TensorKey:
    """What a tensor does, and where."""

    role: Role
    layer: int | None = None
    expert: int | None = None
    is_bias: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint (or one expert's part of it).

    Attributes:
        row: its row in the family, which says how its numbers stand and what it does with the residual stream.
        spec: its file's name for it, its own shape as stored, its encoding and its own bytes.
        offset: bytes from the beginning of the file's tensor; not zero for an expert in a stack.
        scale: what FP8 is multiplied with.
    """

    key: TensorKey
    row: TensorRow
    spec: TensorSpec
    offset: int = 0
    scale: Scale | None = None

    @property
    def gguf_name(self) -> str:
        """Its name in GGUF; experts share the name of their stack."""
        return TensorAddress(self.row, self.key.layer, self.key.expert).gguf_name

    @property
    def hf_name(self) -> str:
        """Its name in a Hugging Face checkpoint."""
        return TensorAddress(self.row, self.key.layer, self.key.expert).hf_name


class Checkpoint:
    """See the module. Use it as a context manager; views must not be used after it is closed.

    Attributes:
        is_gguf: a GGUF file; otherwise a Hugging Face folder.
        family: its rows.
        hf_config: the configuration as transformers takes it.
        config: the same, parsed.
        tensors: by key, in the order of the file.
        gguf: the open file, when it is one.
        folder: the open folder, when it is one.
    """

    def __init__(
        self,
        path: Path,
        file: GGUFFile | SafetensorsFolder,
        family: Family,
        hf_config: Mapping[str, Any],
        tensors: Mapping[TensorKey, StoredTensor],
    ) -> None:
        self.path = path
        self.gguf = file if isinstance(file, GGUFFile) else None
        self.folder = file if isinstance(file, SafetensorsFolder) else None
        self.family = family
        self.hf_config = hf_config
        self.config: ModelConfig = parse_config(family, hf_config)
        self.tensors: Mapping[TensorKey, StoredTensor] = MappingProxyType(dict(tensors))
        self._file: GGUFFile | SafetensorsFolder = file

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        self._file.close()

    @property
    def is_gguf(self) -> bool:
        return self.gguf is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the main chat template."""
        if self.gguf is not None:
            template = self.gguf.metadata.get("tokenizer.chat_template")
            return template if isinstance(template, str) else None
        return dict(read_templates(read_tokenizer_folder(self.path))).get("default")

    def find(
        self, role: Role, layer: int | None = None, expert: int | None = None, *, is_bias: bool = False
    ) -> StoredTensor:
        """The tensor of a role.

        Raises:
            NotFoundError: the model has none.
        """
        key = TensorKey(role, layer, expert, is_bias)
        found = self.tensors.get(key)
        if found is None:
            place = "" if layer is None else f" in layer {layer}" + ("" if expert is None else f", expert {expert}")
            raise NotFoundError(
                f"{str(self.path)!r} has no {role.value}{' bias' if is_bias else ''}{place}",
                why=f"It is a {self.family.name} model with {self.config.n_layers} layers.",
                next=f"List its tensors: ollama-forge show {self.path} --json",
            )
        return found

    def read_raw(self, tensor: StoredTensor) -> memoryview:
        """Its bytes as they lie, not copied."""
        return self._file.read(tensor.spec.name)[tensor.offset : tensor.offset + tensor.spec.nbytes]

    def read_float32(self, tensor: StoredTensor, order: Layout = Layout.STORED, n_threads: int | None = None) -> Floats:
        """Its numbers, float32 of its shape in that layout.

        Raises:
            UnsupportedError: an encoding that cannot be decoded here.
            FormatError: it does not fit the configuration.
        """
        raw = self.read_raw(tensor)
        shape = tensor.spec.shape
        if isinstance(tensor.spec.encoding, GGMLType):
            values = dequantize(raw, tensor.spec.encoding, shape, n_threads=n_threads)
        else:
            values = decode(raw, tensor.spec.encoding, n_threads).astype(np.float32).reshape(shape)
            if tensor.scale is not None and self.folder is not None:
                values *= scale_rows(self.folder, tensor.scale, (shape[0], shape[1]), 0, shape[0])
        if order is Layout.HF and self.is_gguf:
            values = layout.to_hf(values, tensor.row.transform, self.config)
        elif order is Layout.GGUF and not self.is_gguf:
            values = layout.to_gguf(values, tensor.row.transform, self.config)
        return np.ascontiguousarray(values, dtype=np.float32)

    def release(self, tensor: StoredTensor) -> None:
        """Let the system drop its pages from this process."""
        self._file.release(tensor.spec.name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder.

    Raises:
        UnsupportedError: a family that is not known.
        NotFoundError, GGUFError, SafetensorsError, FormatError, UnsafeFileError, DiskError: as the readers say.
    """
    path = Path(path)
    with contextlib.ExitStack() as undo:
        if path.is_dir():
            raw = read_config(path)
            family = find_family(raw)
            folder = open_safetensors(path)
            undo.callback(folder.close)
            checkpoint = Checkpoint(path, folder, family, raw, _tensors_of_folder(family, raw, folder))
        else:
            file = open_gguf(path)
            undo.callback(file.close)
            family = find_family_by_gguf(file.architecture)
            config = _config_of_gguf(family, file)
            checkpoint = Checkpoint(path, file, family, config, _tensors_of_gguf(family, file))
        undo.pop_all()
        return checkpoint


def _config_of_gguf(family: Family, file: GGUFFile) -> dict[str, Any]:
    factors = {}
    for name in _COMPUTED:
        if name in file.tensors:
            tensor = file.tensors[name]
            factors[name] = dequantize(file.read(name), tensor.type, tensor.shape).reshape(-1).tolist()
    return config_from_gguf(family, file.metadata, tensor_names=tuple(file.tensors), rope_factors=factors)


def _tensors_of_gguf(family: Family, file: GGUFFile) -> dict[TensorKey, StoredTensor]:
    found: dict[TensorKey, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        address = family.address_by_gguf_name(name)
        if address is None:
            continue
        row = address.row
        if not row.is_per_expert:
            spec = TensorSpec(name, tensor.shape, tensor.type, tensor.nbytes)
            key = TensorKey(row.role, address.layer, None, row.is_bias)
            found[key] = StoredTensor(key, row, spec)
            continue
        if len(tensor.shape) != 3:
            raise GGUFError(
                f"{name!r} has the shape {tensor.shape}", why="Stacked experts are expected: [experts, rows, columns]."
            )
        each = tensor.nbytes // max(1, tensor.shape[0])
        for expert in range(tensor.shape[0]):
            spec = TensorSpec(name, tensor.shape[1:], tensor.type, each)
            key = TensorKey(row.role, address.layer, expert, row.is_bias)
            found[key] = StoredTensor(key, row, spec, expert * each)
    return found


def _tensors_of_folder(
    family: Family, raw: Mapping[str, Any], folder: SafetensorsFolder
) -> dict[TensorKey, StoredTensor]:
    scales = find_scales(parse_config(family, raw).values.get("quantization_config"), folder.tensors)
    found: dict[TensorKey, StoredTensor] = {}
    for name, tensor in folder.tensors.items():
        cleaned = None if name in scales.dropped else family.clean_hf_name(name)
        if cleaned is None:
            continue
        for address in family.rows_by_hf_name(cleaned):
            row = address.row
            if row not in family.fused:
                spec = TensorSpec(name, tensor.shape, tensor.dtype, tensor.nbytes)
                key = TensorKey(row.role, address.layer, address.expert, row.is_bias)
                found[key] = StoredTensor(key, row, spec, 0, scales.by_weight.get(name))
                continue
            found |= _parts_of_stack(family, address, name, folder)
    return found


def _parts_of_stack(
    family: Family, address: TensorAddress, name: str, folder: SafetensorsFolder
) -> dict[TensorKey, StoredTensor]:
    """The experts in a stacked tensor, each with its part of the rows."""
    tensor = folder.tensors[name]
    number, count = address.row.part or (0, 1)
    if len(tensor.shape) != 3 or tensor.shape[1] % count:
        raise SafetensorsError(
            f"{name!r} has the shape {tensor.shape}", why="Stacked experts are expected: [experts, rows, columns]."
        )
    n_experts, n_rows, n_columns = tensor.shape
    each = tensor.nbytes // max(1, n_experts * count)
    row = next(row for row in family.rows_with_role(address.row.role) if not row.is_bias)
    found = {}
    for expert in range(n_experts):
        spec = TensorSpec(name, (n_rows // count, n_columns), tensor.dtype, each)
        key = TensorKey(row.role, address.layer, expert)
        found[key] = StoredTensor(key, row, spec, (expert * count + number) * each)
    return found
