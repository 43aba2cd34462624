"""Data files to records: JSON lines, JSON arrays, CSV and Parquet, plain or gzipped, in bounded memory.

In: paths. Out: batches of JSON values with the line of each, and the lines that could not be read. What a value means
is the business of `records.py`. A million lines pass in seconds: lines are parsed many at a time, with a random mark
between them that no line can forge, and one by one only where such a batch does not parse.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pydantic_core import from_json

from ollama_forge.dataset.records import KNOWN_KEYS
from ollama_forge.errors import DatasetError, FormatError, MissingExtraError, NotFoundError
from ollama_forge.files import Advance, disk_error

BLOCK_BYTES = 1 << 15  # what is parsed at once stays in the processor's cache: larger blocks are slower
MAX_LINE_BYTES = 64 << 20
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Batch:
    """Some records of a file.

    Attributes:
        values: JSON values, not yet understood.
        lines: of each value, counted from 1; the row in a table or an array.
        problems: (line, reason) of what is not JSON.
        ignored: columns of a table that mean nothing here.
    """

    values: Sequence[Any]
    lines: Sequence[int]
    problems: Sequence[tuple[int, str]] = ()
    ignored: tuple[str, ...] = ()


def find_data_files(paths: Iterable[Path], include: Sequence[str] = ()) -> tuple[Path, ...]:
    """The files that some paths mean: a folder stands for its `*.jsonl`.

    Args:
        paths: files and folders.
        include: patterns of more files to take from a folder, such as `*.json` or `**/*.parquet`.

    Raises:
        NotFoundError: a path that is not there.
        DatasetError: a folder without such files, or no path at all.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"There is no file or folder {str(path)!r}", next="Check the path.")
        if not path.is_dir():
            found[path] = None
            continue
        inside = [entry for pattern in ("*.jsonl", *include) for entry in sorted(_glob(path, pattern))]
        if not inside:
            raise DatasetError(
                f"No .jsonl files in {str(path)!r}",
                why="A folder stands for the .jsonl files in it.",
                next="Name the files themselves, or take others too: --include '*.json'",
            )
        found.update(dict.fromkeys(inside))
    if not found:
        raise DatasetError("No training data was named", next="Begin with a sample: ollama-forge train-data init")
    return tuple(found)


def read_batches(path: Path, advance: Advance | None = None) -> Iterator[Batch]:
    """The records of a file.

    Args:
        path: its name says what it is; any other than `ENDINGS` (and those with `.gz`) is read as JSON lines.
        advance: told of the bytes that were read (of the packed file, where it is packed).

    Raises:
        MissingExtraError: a Parquet file, and pyarrow is not installed.
        FormatError: a Parquet or gzip file that is broken.
        DiskError: it cannot be read.
    """
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        with path.open("rb") as raw:
            counted = _Counted(raw, advance)
            stream = cast("BinaryIO", gzip.GzipFile(fileobj=cast("Any", counted)) if name.endswith(".gz") else counted)
            if kind in (".csv", ".tsv"):
                yield from _read_csv(stream, "\t" if kind == ".tsv" else ",")
            elif kind == ".json":
                yield from _read_array(stream)
            else:
                yield from _read_lines(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise FormatError(
            f"{str(path)!r} is not a whole gzip file", why=str(exc), next="Copy or download it again."
        ) from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


class _Counted:
    """A stream that says how much was read of it."""

    def __init__(self, stream: BinaryIO, advance: Advance | None) -> None:
        self._stream = stream
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if self._advance and data:
            self._advance(len(data))
        return data


def _glob(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from (entry for entry in folder.glob(pattern) if entry.is_file())
    except (ValueError, NotImplementedError) as exc:
        raise DatasetError(
            f"{pattern!r} is not a pattern of file names", why=str(exc), next="Example: --include '*.json'"
        ) from exc


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _read_lines(stream: BinaryIO) -> Iterator[Batch]:
    mark = secrets.token_hex(8)
    number = 1
    pieces: list[bytes] = []
    n_held = 0
    is_too_long = False
    block = stream.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
    while block:
        cut = block.rfind(b"\n")
        if cut < 0:
            n_held += len(block)
            is_too_long = is_too_long or n_held > MAX_LINE_BYTES
            if is_too_long:
                pieces.clear()
            else:
                pieces.append(block)
        else:
            if is_too_long or n_held + block.find(b"\n") > MAX_LINE_BYTES:
                pieces.clear()
                yield Batch((), (), [(number, _TOO_LONG)])
                end = block.find(b"\n")
                block, cut, number = block[end + 1 :], cut - end - 1, number + 1
            if cut >= 0:
                lines = (b"".join([*pieces, block[:cut]])).split(b"\n")
                yield _parse_lines(lines, number, mark)
                number += len(lines)
            pieces = [block[cut + 1 :]]
            n_held = len(pieces[0])
            is_too_long = False
        block = stream.read(BLOCK_BYTES)
    if is_too_long:
        yield Batch((), (), [(number, _TOO_LONG)])
    else:
        yield _parse_lines([b"".join(pieces)], number, mark)


_TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"


def _parse_lines(texts: list[bytes], first: int, mark: str) -> Batch:
    numbers: Sequence[int] = range(first, first + len(texts))
    kept = [text for text in texts if not text.isspace() and text]
    if len(kept) != len(texts):
        numbers = [number for number, text in zip(numbers, texts, strict=True) if not text.isspace() and text]
    if not kept:
        return Batch((), ())
    try:
        mixed = from_json(b"[" + f',"{mark}",'.encode().join(kept) + b"]", allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return _parse_each(kept, numbers)
    if len(mixed) != 2 * len(kept) - 1 or mixed[1::2].count(mark) != len(kept) - 1:
        return _parse_each(kept, numbers)
    return Batch(mixed[::2], numbers)


def _parse_each(texts: list[bytes], numbers: Sequence[int]) -> Batch:
    values, lines, problems = [], [], []
    for text, number in zip(texts, numbers, strict=True):
        try:
            values.append(from_json(text, allow_inf_nan=False))
            lines.append(number)
        except ValueError as exc:
            problems.append((number, _why_not_json(exc)))
    return Batch(values, lines, problems)


def _why_not_json(exc: ValueError) -> str:
    return "not JSON: " + str(exc).replace(" at line 1 column ", " at character ")


# --- JSON arrays ------------------------------------------------------------------------------------------------------


def _read_array(stream: BinaryIO) -> Iterator[Batch]:
    """Values one after another, with or without the brackets and commas of an array around them."""
    decoder = json.JSONDecoder()
    reader = codecs.getreader("utf-8")(stream)
    text, row, is_first = "", 1, True
    try:
        while True:
            text = text.lstrip("\ufeff \t\r\n,")
            if is_first and text.startswith("["):
                text, is_first = text[1:], False
                continue
            values, rows = [], []
            position = 0
            while position < len(text):
                try:
                    value_end = decoder.raw_decode(text, position)[1]
                except ValueError:
                    break
                if value_end == len(text) and text[position] not in "{[":
                    break  # a number may go on in the next block
                values.append(from_json(text[position:value_end], allow_inf_nan=False))
                rows.append(row)
                row += 1
                position = value_end
                while position < len(text) and text[position] in " \t\r\n,":
                    position += 1
            if values:
                yield Batch(values, rows)
                is_first = False
            text = text[position:]
            # what is held back grows, so that a long value is tried a few times and not a thousand
            more = reader.read(max(BLOCK_BYTES, len(text)))
            if not more:
                break
            if len(text) > MAX_LINE_BYTES:
                yield Batch((), (), [(row, _TOO_LONG)])
                return
            text += more
    except (ValueError, RecursionError) as exc:
        yield Batch((), (), [(row, f"not JSON: {_first_line(exc)}")])
        return
    rest = text.strip(" \t\r\n,]")
    if rest:
        yield Batch((), (), [(row, f"not JSON from {rest[:40]!r} on")])


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_csv(stream: BinaryIO, delimiter: str) -> Iterator[Batch]:
    reader = csv.reader(codecs.getreader("utf-8-sig")(stream), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(min(MAX_LINE_BYTES, sys.maxsize))
    header: list[str] = []
    row = 1
    try:
        header = next(reader, [])
        ignored = tuple(name for name in header if name not in KNOWN_KEYS)
        if len(ignored) == len(header):
            yield Batch((), (), [(1, f"no column that means anything here: {', '.join(map(repr, header[:8]))}")])
            return
        for row, cells in enumerate(reader, 2):
            if not cells:
                continue
            if len(cells) != len(header):
                yield Batch((), (), [(row, f"{len(cells)} cells, and the header has {len(header)}")])
                continue
            yield Batch((_known(dict(zip(header, cells, strict=True)), blank=""),), (row,), (), ignored)
    except (csv.Error, UnicodeDecodeError) as exc:
        yield Batch((), (), [(row + 1, f"not a table: {exc}")])
    finally:
        csv.field_size_limit(limit)


def _known(record: Mapping[str, Any], blank: Any) -> dict[str, Any]:
    """A row without columns that mean nothing, and without empty cells in columns that need not be filled."""
    optional = ("input", "system", "history", "tools", "messages", "conversations")
    return {
        key: value
        for key, value in record.items()
        if key in KNOWN_KEYS and value is not None and not (key in optional and value == blank)
    }


def _read_parquet(path: Path) -> Iterator[Batch]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"{str(path)!r} is a Parquet file, and pyarrow is not installed",
            why="It comes with the training extra.",
            next="pip install 'ollama-forge[train]', or save the data as .jsonl",
        ) from exc
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = [name for name in names if name in KNOWN_KEYS]
            ignored = tuple(name for name in names if name not in KNOWN_KEYS)
            if not wanted:
                yield Batch((), (), [(1, f"no column that means anything here: {', '.join(map(repr, names[:8]))}")])
                return
            row = 1
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                values = [_known(record, blank=None) for record in batch.to_pylist()]
                yield Batch(values, range(row, row + len(values)), (), ignored)
                row += len(values)
    except ArrowException as exc:
        raise FormatError(
            f"{str(path)!r} is not a Parquet file that can be read",
            why=_first_line(exc),
            next="Write or download it again.",
        ) from exc
