"""An importance matrix from a model and a text: what `quantize --imatrix` wants to know, without llama.cpp's program.

In: a model on this disk and a text. Out: a GGUF file as `llama-imatrix` writes it, or with `dry_run` what it would be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.arch.kv_cache import trained_context
from ollama_forge.dataset.windows import cut_windows, text_ids
from ollama_forge.errors import DatasetError, NotFoundError, TrainingError, UsageError
from ollama_forge.files import Progress, disk_error, no_progress, refuse_existing, require_free_space
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.measure import built_in_text
from ollama_forge.jobs.measure_models import require_packages
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.tokenizer.encode import GGUFTokenizer, build_tokenizer

if TYPE_CHECKING:
    from ollama_forge.gguf.imatrix import Imatrix

MIN_CONTEXT = 32
"""llama.cpp leaves out products of fewer than 16 tokens; a shorter chunk would say little anyway."""

ENOUGH_TOKENS = 10_000
"""More gain nothing (measured by llama.cpp's users); with fewer the matrix is somewhat arbitrary."""

_HEADER_BYTES = 1 << 12


@dataclass(frozen=True)
class ImatrixOptions:
    """How to read the text.

    Attributes:
        context: tokens in a chunk.
        n_chunks: at most so many; None for all of them.
        device: `auto`, `cpu` or `cuda`.
    """

    context: int = 512
    n_chunks: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class MadeImatrix:
    """An importance matrix on disk, or with `is_dry_run` the one that would be made (`sha256` is empty then).

    Attributes:
        text_tokens: of the whole text; `chunks` of `context` tokens were read of it.
        unseen: tensors of which some experts got no token, with how many.
    """

    output: Path
    size_bytes: int
    sha256: str
    entries: int
    chunks: int
    context: int
    text_tokens: int
    unseen: tuple[tuple[str, int], ...]
    seconds: float
    warnings: tuple[str, ...]
    is_dry_run: bool

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output),
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "entries": self.entries,
            "chunks": self.chunks,
            "context": self.context,
            "tokens": self.chunks * self.context,
            "text_tokens": self.text_tokens,
            "unseen_experts": dict(self.unseen),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def make_imatrix(
    ref: str,
    text: Path | None,
    output: Path,
    options: ImatrixOptions | None = None,
    *,
    store_path: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> MadeImatrix:
    """Run the text through the model and write what reached each matrix.

    Args:
        ref: any model; a Hugging Face folder is converted to 16 bits beside the output first, and removed again.
        text: a file in UTF-8, of which a line break at the end does not count, as in llama.cpp; None for the short
            text of this package.

    Raises:
        UsageError: a chunk that is too short, too long for the model, or longer than the text.
        UnsupportedError: a family without rows.
        MissingExtraError: torch and its friends are not installed.
        DatasetError: the text is not text.
    """
    options = options or ImatrixOptions()
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    require_packages()
    content = built_in_text() if text is None else read_text(text)
    with _open_model(ref, output, store_path, progress) as (file, warnings):
        tokenizer = build_tokenizer(file.metadata)
        ids = text_ids(tokenizer, content)
        windows = _chunks(file, tokenizer, ids, options)
        names = weighted_tensors(file)
        if dry_run:
            size_bytes = _size_estimate(file, names)
            require_free_space(output.parent, size_bytes, output.name)
            return MadeImatrix(
                output, size_bytes, "", len(names), len(windows), options.context, len(ids), (),
                time.monotonic() - started, warnings, is_dry_run=True,
            )  # fmt: skip
        if len(windows) * options.context < ENOUGH_TOKENS:
            warnings = (*warnings, _short_text(len(windows) * options.context, text))
        imatrix = _measure(file, windows, "ollama-forge" if text is None else text.name, options, progress)
    return _write(output, imatrix, options, len(ids), started, warnings, overwrite=overwrite)


def read_text(path: Path) -> str:
    """A text as llama.cpp takes it from a file: one line break at the end is left out.

    Raises:
        NotFoundError: no such file.
        DatasetError: it is not UTF-8, or empty.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path given to --text.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise DatasetError(
            f"{str(path)!r} is not text in UTF-8: byte {exc.start} is {raw[exc.start]:#04x}",
            next=f"Convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > text.txt",
        ) from exc
    content = content.removesuffix("\n")
    if not content.strip():
        raise DatasetError(f"{str(path)!r} holds no text", next="Give a text of some thousand words.")
    return content


def weighted_tensors(file: GGUFFile) -> tuple[str, ...]:
    """Names of the tensors that an importance matrix speaks of: every matrix of the blocks.

    Raises:
        UnsupportedError: a family without rows.
    """
    family = find_family_by_gguf(file.architecture)
    return tuple(
        name
        for name, tensor in file.tensors.items()
        if name.startswith("blk.") and name.endswith(".weight") and len(tensor.shape) > 1
        if family.address_by_gguf_name(name) is not None
    )


@contextlib.contextmanager
def _open_model(
    ref: str, output: Path, store_path: Path | None, progress: Progress
) -> Iterator[tuple[GGUFFile, tuple[str, ...]]]:
    model = resolve(ref, store_path)
    warnings = []
    if model.adapters:
        warnings.append(
            f"The {len(model.adapters)} adapter layers of {ref!r} are left out: the matrix is for its weights alone."
        )
    with contextlib.ExitStack() as stack:
        path = model.gguf_path
        if model.folder is not None:
            scratch = stack.enter_context(scratch_folder(_existing(output.parent)))
            path = scratch / "model.gguf"
            convert_folder(model.folder, path, ConvertOptions(), progress=progress)
        assert path is not None
        yield stack.enter_context(open_gguf(path)), tuple(warnings)


def _short_text(n_tokens: int, text: Path | None) -> str:
    advice = "Give one of your own with --text" if text is None else "Give a longer one"
    return f"Only {n_tokens:,} tokens were read; about {ENOUGH_TOKENS:,} make a good matrix. {advice}."


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _chunks(
    file: GGUFFile, tokenizer: GGUFTokenizer, ids: Sequence[int], options: ImatrixOptions
) -> list[Sequence[int]]:
    """The chunks that `llama-imatrix` would read: whole ones only, each with the begin token first."""
    longest = trained_context(file)
    if options.context < MIN_CONTEXT or (longest is not None and options.context > longest):
        raise UsageError(
            f"A context of {options.context} tokens does not go with this model",
            why=f"It must be from {MIN_CONTEXT} to {longest or 'what the model was trained for'}.",
            next=f"Example: --context {min(512, longest or 512)}",
        )
    if len(ids) < options.context:
        raise UsageError(
            f"The text has {len(ids):,} tokens, which is not one chunk of {options.context}",
            why="Only whole chunks are read.",
            next=f"Give a longer text, or --context {max(MIN_CONTEXT, len(ids) // 2)}.",
        )
    windows = cut_windows(tokenizer, ids, options.context)[: options.n_chunks]
    return [window.input_ids for window in windows]


def _measure(
    file: GGUFFile, windows: Sequence[Sequence[int]], dataset: str, options: ImatrixOptions, progress: Progress
) -> Imatrix:
    from ollama_forge.train.importance import measure_importance
    from ollama_forge.train.scored_model import ScoreOptions, scored_model

    total = len(windows) * options.context
    with (
        scored_model(file, options=ScoreOptions(device=options.device)) as packed,
        progress(f"Reading {total:,} tokens", total) as advance,
    ):
        return measure_importance(packed, windows, dataset=dataset, advance=advance)


def _write(
    output: Path,
    imatrix: Imatrix,
    options: ImatrixOptions,
    text_tokens: int,
    started: float,
    warnings: Sequence[str],
    *,
    overwrite: bool,
) -> MadeImatrix:
    from ollama_forge.gguf.imatrix import write_imatrix

    if not imatrix.entries:
        raise TrainingError("No matrix of the model was reached by the text", next="Report this with the model's name.")
    unseen = tuple(
        (name, int((entry.counts == 0).sum()))
        for name, entry in sorted(imatrix.entries.items())
        if (entry.counts == 0).any()
    )
    said = list(warnings)
    if unseen:
        said.append(
            f"In {len(unseen)} of {len(imatrix.entries)} tensors some experts got no token of this text, most in "
            f"{max(unseen, key=lambda item: item[1])[0]!r}: give more text, or more varied text."
        )
    written = write_imatrix(output, imatrix, overwrite=overwrite)
    return MadeImatrix(
        output=output,
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        entries=len(imatrix.entries),
        chunks=imatrix.chunk_count,
        context=options.context,
        text_tokens=text_tokens,
        unseen=unseen,
        seconds=time.monotonic() - started,
        warnings=tuple(said),
        is_dry_run=False,
    )


def _size_estimate(file: GGUFFile, names: Sequence[str]) -> int:
    total = _HEADER_BYTES
    for name in names:
        shape = file.tensors[name].shape
        n_matrices = shape[0] if len(shape) > 2 else 1
        total += 4 * n_matrices * (shape[-1] + 1) + 4 * len(name) + 64
    return total
