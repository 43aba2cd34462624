"""Whole jobs that end in a GGUF file: a Hugging Face folder converted, a GGUF quantized, both in one pass.

In: a local path and options. Out: `ConvertedFile`, or the plan alone with `dry_run`. Landing is `jobs.landing`'s.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ollama_forge.convert.llama_cpp import convert_with_llama_cpp
from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import FormatError, UsageError
from ollama_forge.files import Progress, atomic_output, make_folder, no_progress, refuse_existing, require_free_space
from ollama_forge.gguf.finite import finite_entry
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.quantize import QuantizeOptions, plan_quantization
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType, parse_file_type, parse_type, tensor_bytes
from ollama_forge.gguf.writer import Field, TensorEntry, copy_entry, from_reader, plan_layout, write_gguf


@dataclass(frozen=True)
class TypeShare:
    """How much of a file one tensor type takes."""

    type: str
    tensors: int
    size_bytes: int
    elements: int

    @property
    def bits_per_weight(self) -> float:
        return self.size_bytes * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class ConvertedFile:
    """A GGUF on disk, or the file that a dry run would write. `sha256` is empty where nothing was hashed."""

    output: Path
    size_bytes: int
    sha256: str
    types: tuple[TypeShare, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return sum(share.tensors for share in self.types)

    def document(self) -> dict[str, object]:
        """The JSON form that `convert` and `quantize` promise."""
        return {
            "output": str(self.output),
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "tensors": self.tensors,
            "types": {share.type: share.tensors for share in self.types},
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class PlannedGGUF:
    """A GGUF whose every byte is decided but not yet computed."""

    fields: Sequence[Field]
    entries: Sequence[TensorEntry]
    size_bytes: int
    alignment: int = 32
    warnings: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[TypeShare, ...]:
        return type_shares([(entry.type, entry.shape) for entry in self.entries])


def type_shares(tensors: Sequence[tuple[GGMLType, Sequence[int]]]) -> tuple[TypeShare, ...]:
    """The mix of a file, the type with the most bytes first."""
    count: Counter[GGMLType] = Counter()
    size: Counter[GGMLType] = Counter()
    elements: Counter[GGMLType] = Counter()
    for type_, shape in tensors:
        n = 1
        for dim in shape:
            n *= dim
        count[type_] += 1
        size[type_] += tensor_bytes(type_, shape)
        elements[type_] += n
    return tuple(TypeShare(t.name, count[t], size[t], elements[t]) for t, _ in size.most_common())


def quantize_options(
    file_type: str,
    *,
    imatrix: Path | None = None,
    tensor_types: Sequence[str] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    allow_requantize: bool = False,
    n_threads: int | None = None,
) -> QuantizeOptions:
    """Options as typed become options as used; every word is checked here, before any work.

    Raises:
        UsageError: an unknown type, or a `--tensor-type` that is not `REGEX=TYPE`.
    """
    overrides = []
    for text in tensor_types:
        pattern, sign, type_name = text.rpartition("=")
        if not sign or not pattern:
            raise UsageError(f"--tensor-type {text!r} is not REGEX=TYPE", next="Example: --tensor-type 'ffn_down=q6_k'")
        overrides.append((pattern, parse_type(type_name)))
    return QuantizeOptions(
        file_type=parse_file_type(file_type),
        imatrix=read_imatrix(imatrix) if imatrix else None,
        tensor_types=tuple(overrides),
        output_tensor_type=parse_type(output_type) if output_type else None,
        token_embedding_type=parse_type(embedding_type) if embedding_type else None,
        pure=pure,
        allow_requantize=allow_requantize,
        n_threads=n_threads,
    )


def convert_options(
    outtype: str, quantize: QuantizeOptions | None, *, name: str | None = None, n_threads: int | None = None
) -> ConvertOptions:
    """Options of a conversion as typed."""
    return ConvertOptions(outtype=outtype, quantize=quantize, name=name, n_threads=n_threads)


@contextlib.contextmanager
def open_folder(folder: Path, options: ConvertOptions) -> Iterator[PlannedGGUF]:
    """A Hugging Face folder as the GGUF that it will be; its files stay open inside the block."""
    with plan_conversion(folder, options) as conversion:
        yield PlannedGGUF(conversion.fields, conversion.entries, conversion.size_bytes, warnings=conversion.warnings)


@contextlib.contextmanager
def open_quantization(source: Path, options: QuantizeOptions) -> Iterator[PlannedGGUF]:
    """A GGUF as its quantized form will be; the source stays open inside the block."""
    with open_gguf(source) as gguf:
        plan = plan_quantization(gguf, options)
        yield PlannedGGUF(plan.fields, plan.entries, plan.size_bytes, plan.alignment, plan.warnings)


@contextlib.contextmanager
def open_joined(source: Path) -> Iterator[PlannedGGUF]:
    """A GGUF (a split set, mostly) as one file, every tensor byte for byte."""
    with open_gguf(source) as gguf:
        fields = [from_reader(entry) for key, entry in gguf.fields.items() if not key.startswith("split.")]
        entries = [copy_entry(gguf, name) for name in gguf.tensors]
        size_bytes = plan_layout(fields, entries, gguf.alignment).size_bytes
        yield PlannedGGUF(fields, entries, size_bytes, gguf.alignment)


def convert_folder(
    folder: Path,
    output: Path,
    options: ConvertOptions,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ConvertedFile:
    """Convert (and quantize) a Hugging Face folder into one GGUF file, in one pass."""
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    with open_folder(folder, options) as planned:
        return write_planned(planned, output, started, overwrite=overwrite, dry_run=dry_run, progress=progress)


def convert_foreign_folder(
    folder: Path,
    output: Path,
    options: ConvertOptions,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConvertedFile:
    """Convert a folder with llama.cpp's own converter, for families that have no rows here (`--converter llama.cpp`).

    Raises:
        MissingExtraError: that converter is not installed.
    """
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    make_folder(output.parent)
    with convert_with_llama_cpp(folder, output.parent, options) as converted:
        opened = open_quantization(converted, options.quantize) if options.quantize else open_joined(converted)
        with opened as planned:
            checked = planned if options.quantize else replace(planned, entries=[*map(finite_entry, planned.entries)])
            return write_planned(checked, output, started, overwrite=overwrite, dry_run=False, progress=progress)


def quantize_file(
    source: Path,
    output: Path,
    options: QuantizeOptions,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ConvertedFile:
    """Quantize a GGUF into another GGUF file, equal to llama-quantize's.

    Raises:
        FormatError: source and output are the same file.
    """
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    if output.exists() and output.samefile(source):
        raise FormatError(
            f"{str(output)!r} is the source itself",
            why="A model is never quantized in place: the source would be lost.",
            next="Choose another name for -o.",
        )
    with open_quantization(source, options) as planned:
        return write_planned(planned, output, started, overwrite=overwrite, dry_run=dry_run, progress=progress)


def write_planned(
    planned: PlannedGGUF,
    output: Path,
    started: float,
    *,
    overwrite: bool,
    dry_run: bool,
    is_hashed: bool = True,
    progress: Progress,
) -> ConvertedFile:
    """Write a planned GGUF under `output`, or with `dry_run` only check that it would fit."""
    sha256 = ""
    if dry_run:
        require_free_space(output.parent, planned.size_bytes, output.name)
    else:
        with (
            atomic_output(output, overwrite=overwrite, expected_bytes=planned.size_bytes, is_hashed=is_hashed) as sink,
            progress(f"Writing {output.name}", planned.size_bytes) as advance,
        ):
            write_gguf(sink, planned.fields, planned.entries, alignment=planned.alignment, advance=advance)
        sha256 = sink.sha256
    return ConvertedFile(
        output, planned.size_bytes, sha256, planned.types, time.monotonic() - started, planned.warnings
    )
