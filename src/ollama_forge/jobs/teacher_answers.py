"""A teacher writes answers that a student can learn as text, whatever the two tokenizers are.

In: conversations that end with the user, and who answers: a model on this disk through the engine, or an Ollama name
on one or several running Ollamas at once. Out: training data, `answers.jsonl`, in the order of the prompts. Each answer
is kept when it comes: a run that was stopped asks only for what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ollama_forge.dataset.examples import Example
from ollama_forge.dataset.prompts import TEXT_ENDINGS, read_prompts
from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.engine import loading_from_parameters, open_engine, sampling_from_parameters
from ollama_forge.errors import DatasetError, ForgeError, NotFoundError, ServerError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.jobs.lineage import Ingredient, hashed_ingredient, working
from ollama_forge.jobs.refusal_answers import as_gguf
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.server import OllamaServer

ANSWERS = "answers"
"""Role of the data that a teacher wrote."""
ANSWERS_FOLDER = "answers"
ANSWERS_FILE = "answers.jsonl"
DONE_FILE = "done"
KEPT_FILE = "answers.kept.jsonl"
_MOST_FAILURES = 3
_POLL_SECONDS = 0.1

Turns = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class AskOptions:
    """Who is asked, and how.

    Attributes:
        teacher: as the hosts know it.
        hosts: addresses of running Ollamas; empty: the engine here.
        max_tokens: of an answer.
        parallel: requests at a time, for each host.
    """

    teacher: str
    hosts: tuple[str, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    parallel: int = 4


@dataclass(frozen=True)
class AskReport:
    """Where the asking stands; tokens and seconds are of this run."""

    n_done: int
    n_total: int
    n_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class AnswerSheet:
    """What came of it.

    Attributes:
        path: training data in messages form.
        n_asked: answers of this run; n_kept: those that were there already; n_empty: prompts without an answer.
    """

    path: Path
    n_asked: int
    n_kept: int
    n_empty: int
    n_tokens: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        rate = self.n_tokens / self.seconds if self.seconds > 0 else 0.0
        return {**asdict(self), "path": str(self.path), "tokens_per_second": round(rate, 1)}


OnAnswered = Callable[[AskReport], None]


def read_questions(data: Sequence[Path], include: Sequence[str] = ()) -> list[Turns]:
    """The prompts of text files (one a line) and the conversations of training data up to their last answer, each once.

    Raises:
        DatasetError: there is none.
    """
    texts, others = _question_files(data, include)
    found: dict[Turns, None] = {}
    if texts:
        for prompt in read_prompts(texts, at_least=1):
            found[(_Turn(role="user", content=prompt),)] = None
    if others:
        for example in read_dataset(others).examples:
            turns = _question_of(example)
            if turns:
                found[turns] = None
    if not found:
        raise DatasetError("The data hold no question", next="Give prompts (.txt, one a line) or training data.")
    return list(found)


def _question_files(data: Sequence[Path], include: Sequence[str]) -> tuple[list[Path], tuple[Path, ...]]:
    """Texts, and files of training data."""
    texts = [path for path in data if path.suffix.lower() in TEXT_ENDINGS]
    others = [path for path in data if path not in texts]
    return texts, find_data_files(others, include) if others else ()


def asking_work(
    data: Sequence[Path],
    include: Sequence[str],
    options: AskOptions,
    folder: Path,
    models: Sequence[Ingredient] = (),
) -> AbstractContextManager[None]:
    """What the registry is told of answers that were gathered in `folder`: their questions are the data, and they
    themselves were made on the way."""
    texts, others = _question_files(data, include)
    questions = [hashed_ingredient(path, "data") for path in (*texts, *others)]
    answers = hashed_ingredient(folder / ANSWERS_FILE, ANSWERS)
    return working("distill", [*models, *questions, answers], ask=options)


class _Turn(dict[str, str]):
    """A turn that can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash((self["role"], self["content"]))


def _question_of(example: Example) -> Turns:
    turns = [_Turn(role=str(turn["role"]), content=str(turn.get("content") or "")) for turn in example.messages()]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return tuple(turns)


def gather_answers(
    questions: Sequence[Turns],
    options: AskOptions,
    folder: Path,
    *,
    model: ResolvedModel | None = None,
    on_answer: OnAnswered | None = None,
) -> AnswerSheet:
    """Ask for every answer that is not there yet, and write the data.

    Args:
        model: the teacher on this disk, where no host is asked.

    Raises:
        ServerError, NotFoundError: no host is left that answers; what came is kept.
        DatasetError: not one answer has words.
    """
    started = time.monotonic()
    make_folder(folder)
    identity = str(model.gguf_path or model.folder) if model is not None else options.teacher
    keys = [_key(identity, turns, options) for turns in questions]
    kept = _read_kept(folder / KEPT_FILE)
    missing = [number for number, key in enumerate(keys) if key not in kept]
    # written anew: a line that a killed run left half is gone
    lines = "".join(json.dumps({"key": key, **row}) + "\n" for key, row in kept.items())
    write_bytes(folder / KEPT_FILE, lines.encode(), overwrite=True)
    with (folder / KEPT_FILE).open("ab") as stream:
        book = _Book(stream, kept, len(questions), len(questions) - len(missing), started, on_answer)
        if missing and model is not None and not options.hosts:
            _ask_engine(model, questions, keys, missing, options, book)
        elif missing:
            _ask_hosts(questions, keys, missing, options, book)
    texts = [str(kept[key]["text"]).strip() for key in keys]
    rows = [
        json.dumps({"messages": [*turns, {"role": "assistant", "content": text}]}, ensure_ascii=False)
        for turns, text in zip(questions, texts, strict=True)
        if text
    ]
    if not rows:
        raise DatasetError(
            f"{options.teacher!r} gave no answer with words to any of {len(questions)} questions",
            next="Raise --answer-tokens (a model that thinks needs many), or choose another teacher.",
        )
    write_bytes(folder / ANSWERS_FILE, ("\n".join(rows) + "\n").encode(), overwrite=True)
    return AnswerSheet(
        folder / ANSWERS_FILE,
        n_asked=len(missing),
        n_kept=len(questions) - len(missing),
        n_empty=len(questions) - len(rows),
        n_tokens=book.n_tokens,
        seconds=time.monotonic() - started,
    )


def _key(identity: str, turns: Turns, options: AskOptions) -> str:
    asked = [identity, [dict(turn) for turn in turns], options.max_tokens, options.temperature, options.seed]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    kept = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off when a run was killed
        if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("text"), str):
            kept[row.pop("key")] = row
    return kept


class _Book:
    """Takes answers from several threads, and writes each down at once."""

    def __init__(
        self,
        stream: BinaryIO,
        kept: dict[str, dict[str, Any]],
        n_total: int,
        n_done: int,
        started: float,
        on_answer: OnAnswered | None,
    ) -> None:
        self.n_tokens = 0
        self.n_done = n_done
        self.n_total = n_total
        self._stream = stream
        self._kept = kept
        self._started = started
        self._on_answer = on_answer
        self._lock = threading.Lock()

    def write(self, key: str, text: str, n_tokens: int, who: str) -> None:
        row = {"text": text, "tokens": n_tokens, "who": who}
        with self._lock:
            self._stream.write((json.dumps({"key": key, **row}) + "\n").encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._kept[key] = row
            self.n_done += 1
            self.n_tokens += n_tokens
            if self._on_answer:
                seconds = time.monotonic() - self._started
                self._on_answer(AskReport(self.n_done, self.n_total, self.n_tokens, seconds))


def _ask_engine(
    model: ResolvedModel,
    questions: Sequence[Turns],
    keys: Sequence[str],
    missing: Sequence[int],
    options: AskOptions,
    book: _Book,
) -> None:
    parameters = dict(model.modelfile.parameters)
    sampling = replace(
        sampling_from_parameters(parameters),
        temperature=options.temperature,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )
    adapters = [(path, 1.0) for path in model.adapters]
    with as_gguf(model) as opened:
        assert opened.gguf_path is not None
        loading: dict[str, Any] = loading_from_parameters(parameters)
        with open_engine(opened.gguf_path, adapters=adapters, **loading) as engine:
            for number in missing:
                said = engine.chat([dict(turn) for turn in questions[number]], sampling)
                book.write(keys[number], said.text, len(said.token_ids), "engine")


def _ask_hosts(
    questions: Sequence[Turns], keys: Sequence[str], missing: Sequence[int], options: AskOptions, book: _Book
) -> None:
    waiting: queue.Queue[int] = queue.Queue()
    for number in missing:
        waiting.put(number)
    errors: list[ForgeError] = []
    stop = threading.Event()
    threads = [
        threading.Thread(target=_work, args=(host, waiting, questions, keys, options, book, errors, stop), daemon=True)
        for host in options.hosts
        for _ in range(options.parallel)
    ]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and book.n_done < book.n_total:
            time.sleep(_POLL_SECONDS / 4)
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    if book.n_done < book.n_total:
        raise _no_host_left(errors, book)


def _no_host_left(errors: Sequence[ForgeError], book: _Book) -> ForgeError:
    last = errors[-1] if errors else ServerError("No host answered")
    kind = NotFoundError if isinstance(last, NotFoundError) else ServerError
    return kind(
        f"{book.n_total - book.n_done} of {book.n_total} answers are missing: {last.what}",
        why=last.why or "Every host failed; what came before is kept.",
        next=f"{last.next} Then run the same command again: it goes on where it stopped.".strip(),
    )


def _work(
    host: str,
    waiting: queue.Queue[int],
    questions: Sequence[Turns],
    keys: Sequence[str],
    options: AskOptions,
    book: _Book,
    errors: list[ForgeError],
    stop: threading.Event,
) -> None:
    """One conversation after the other on one host, until nothing is left or the host has failed too often."""
    settings = {"temperature": options.temperature, "seed": options.seed, "num_predict": options.max_tokens}
    n_failures = 0
    with OllamaServer(host) as server:
        for number in _taken(waiting, stop):
            try:
                said = server.chat(options.teacher, [dict(turn) for turn in questions[number]], options=settings)
            except ForgeError as error:
                waiting.put(number)
                errors.append(error)
                n_failures += 1
                if n_failures >= _MOST_FAILURES or isinstance(error, NotFoundError):
                    return
                continue
            n_failures = 0
            book.write(keys[number], said.text, said.n_tokens, host)


def _taken(waiting: queue.Queue[int], stop: threading.Event) -> Iterator[int]:
    while not stop.is_set():
        try:
            yield waiting.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue  # another one may still fail and give its question back
