"""The text on which a model shows what matters in it, and the pass that looks.

In: an open GGUF, and a text or training data (or the text of this package). Out: an `Importance`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.tokenize import tokenize_examples
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.dataset.windows import text_windows
from ollama_forge.errors import NotFoundError, UsageError
from ollama_forge.files import Progress, no_progress
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.jobs.pruning_request import CalibrationOptions
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.transform.ranking import Importance

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_OWN_TEXT = "calibrate.txt"


def measure_ranking(
    gguf: GGUFFile,
    options: CalibrationOptions,
    parts: Iterable[str] = (),
    *,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Importance:
    """Let the model read, and look at what its parts do.

    Args:
        parts: what is measured beside the layers (`Target.parts`).

    Raises:
        NotFoundError, DatasetError, UsageError: a text that is not there or too short.
    """
    from ollama_forge.train.importance_run import run_importance

    rows = read_rows(gguf, options)
    with progress("Reading the text", sum(len(row) for row in rows)) as advance:
        return run_importance(gguf, rows, parts, device=options.device, n_threads=n_threads, advance=advance)


def read_rows(gguf: GGUFFile, options: CalibrationOptions) -> list[Sequence[int]]:
    """Rows of token ids, at most `n_tokens` in all; the same seed draws the same rows.

    Raises:
        NotFoundError, DatasetError, UsageError: as above.
    """
    path = options.text
    if path is not None and not path.exists():
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path given to --text.")
    rows: list[Sequence[int]]
    if path is not None and (path.is_dir() or path.suffix.lower() in DATA_SUFFIXES):
        chat_format = chat_format_of(gguf.metadata)
        examples = read_dataset(find_data_files((path,), ())).examples
        tokenized = tokenize_examples(examples, chat_format, max_length=options.context, skip_refused=True)
        rows = [row.input_ids for row in tokenized.rows]
    else:
        text = read_calibration_text(path)
        windows = text_windows(build_tokenizer(gguf.metadata), text, options.context)
        rows = [window.input_ids for window in windows]
    return _drawn(rows, options)


def read_calibration_text(path: Path | None) -> str:
    """A text file as UTF-8; None: the text of this package.

    Raises:
        UsageError: it is not text.
    """
    if path is None:
        return (resources.files("ollama_forge.dataset") / "texts" / _OWN_TEXT).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"{str(path)!r} is not a text in UTF-8",
            why=f"{exc.reason} at byte {exc.start}.",
            next="Give a .txt or .md file, or training data as .jsonl.",
        ) from exc


def _drawn(rows: list[Sequence[int]], options: CalibrationOptions) -> list[Sequence[int]]:
    if sum(len(row) for row in rows) <= options.n_tokens:
        return rows
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    chosen: list[int] = []
    left = options.n_tokens
    for number in order:
        if chosen and len(rows[number]) > left:
            break
        chosen.append(number)
        left -= len(rows[number])
    return [rows[number] for number in sorted(chosen)]
