"""What the wizard can do and what it asks for it: rows of jobs and questions; answers in, one command line out.

Nothing here prints or asks; `wizard` does. A job is offered when its command is in the table of commands.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli import COMMANDS, root
from ollama_forge.errors import UsageError

Answers = Mapping[str, Any]


class Kind(Enum):
    """What an answer must be."""

    TEXT = "text"
    FILE = "a file or folder that exists"
    NUMBER = "a number above 0"
    LEVEL = "a number, 0 or above"
    COUNT = "a whole number above 0"
    CHOICE = "one of a few"
    SIZE = "a share (70%), a size (2GB) or a number of parameters (3B)"
    YES = "yes or no"


@dataclass(frozen=True)
class Question:
    """One question; its answer becomes `flag` and a word.

    Attributes:
        default: taken when nothing is typed; None: there must be an answer; "" : it may be left out.
    """

    key: str
    text: str
    kind: Kind = Kind.TEXT
    default: str | None = ""
    flag: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class WizardJob:
    """A job that the wizard offers.

    Attributes:
        words: the command.
        model_words: how the command takes the model: a flag, or nothing for an argument.
        fit: which of the lights belongs to it.
    """

    key: str
    title: str
    words: tuple[str, ...]
    model_words: tuple[str, ...]
    fit: str
    questions: tuple[Question, ...]


QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")

JOBS = (
    WizardJob(
        "customise",
        "another system prompt or other parameters (kilobytes, at once)",
        ("create-from-base",),
        ("--base",),
        "run",
        (
            Question("system", "System prompt: what shall it be or do?", flag="--system"),
            Question("temperature", "Temperature: 0 is exact, 1 is lively", Kind.LEVEL, flag="--temperature"),
            Question("num_ctx", "Context in tokens", Kind.COUNT, flag="--num-ctx"),
        ),
    ),
    WizardJob(
        "quantize",
        "smaller and faster, a little less exact",
        ("convert",),
        ("--gguf",),
        "quantize",
        (Question("type", "To which type?", Kind.CHOICE, "Q4_K_M", "--quant", QUANTS),),
    ),
    WizardJob(
        "finetune",
        "teach it something from examples",
        ("finetune",),
        ("--base",),
        "finetune",
        (
            Question("data", "Training data: a .jsonl file or a folder", Kind.FILE, None, "--data"),
            Question("epochs", "Times through the data", Kind.NUMBER, "3", "--epochs"),
            Question("max_length", "Tokens of an example", Kind.COUNT, "1024", "--max-length"),
            Question("merge", "Merge into the weights (yes), or keep a small layer (no)?", Kind.YES, "no", "--merge"),
        ),
    ),
    WizardJob(
        "abliterate",
        "take away a kind of refusal",
        ("abliterate", "run"),
        ("--model",),
        "abliterate",
        (
            Question("harmful", "Prompts that it refuses (a file, one a line)", Kind.FILE, None, "--harmful"),
            Question("harmless", "Prompts that it answers (a file, one a line)", Kind.FILE, None, "--harmless"),
        ),
    ),
    WizardJob(
        "downsize",
        "fewer layers, healed by teaching it again",
        ("downsize", "pipeline"),
        (),
        "downsize",
        (
            Question("target", "How small: a share (70%), a size (2GB), parameters (3B)", Kind.SIZE, "70%", "--target"),
            Question("data", "Texts or conversations to heal it with: a file or a folder", Kind.FILE, None, "--data"),
        ),
    ),
)

FIRST = (
    Question("model", "Which model? A number of the list, a name, a path or hf:org/repo", default=None),
    Question("name", "Name of the result", default=None),
    Question("replace", "There is a model of that name. Replace it?", Kind.YES, "no"),
    Question("job", "What shall be done?", Kind.CHOICE, None, choices=tuple(job.key for job in JOBS)),
)
RUN = Question("run", "Run it?", Kind.YES, "yes")


def offered_jobs() -> tuple[WizardJob, ...]:
    """Those whose command there is."""
    commands = {name for group in COMMANDS.values() for name in group}
    return tuple(job for job in JOBS if job.words[0] in commands and _has_subcommand(job.words))


def _has_subcommand(words: tuple[str, ...]) -> bool:
    context = click.Context(root)
    command = root.get_command(context, words[0])
    return not isinstance(command, click.Group) or words[1] in command.list_commands(context)


def parse_answer(question: Question, text: object) -> str:
    """What was typed, or stands in a file, as the word that the command line takes; empty: nothing was wanted.

    Raises:
        UsageError: it is not what the question asks for.
    """
    if isinstance(text, bool):
        word = "yes" if text else "no"
    else:
        word = "" if text is None else str(text).strip()
    if not word:
        if question.default is None:
            raise _wrong(question, word, "An answer is needed.")
        return question.default
    return _CHECKS[question.kind](question, word)


def _text(_question: Question, word: str) -> str:
    return word


def _file(question: Question, word: str) -> str:
    path = Path(word).expanduser()
    if not path.exists():
        raise _wrong(question, word, "There is no such file or folder.")
    return str(path)


def _number(question: Question, word: str) -> str:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    is_good = value > 0 or (value == 0 and question.kind is Kind.LEVEL)
    if not is_good or value == float("inf"):
        raise _wrong(question, word, f"It must be {question.kind.value}.")
    return word


def _count(question: Question, word: str) -> str:
    if not word.isdecimal() or int(word) < 1:
        raise _wrong(question, word, f"It must be {question.kind.value}.")
    return word


def _choice(question: Question, word: str) -> str:
    if word.isdecimal() and 1 <= int(word) <= len(question.choices):
        return question.choices[int(word) - 1]
    for choice in question.choices:
        if choice.lower() == word.lower():
            return choice
    raise _wrong(question, word, f"There are: {', '.join(question.choices)}.")


def _size(question: Question, word: str) -> str:
    number = word.upper().removesuffix("B").rstrip("%GMK").strip()
    return _number(question, number) and word.replace(" ", "")


def _yes(question: Question, word: str) -> str:
    if word.lower() in ("y", "yes", "true", "1", "j", "ja"):
        return "yes"
    if word.lower() in ("n", "no", "false", "0", "nein"):
        return "no"
    raise _wrong(question, word, "It must be yes or no.")


_CHECKS = {
    Kind.TEXT: _text,
    Kind.FILE: _file,
    Kind.NUMBER: _number,
    Kind.LEVEL: _number,
    Kind.COUNT: _count,
    Kind.CHOICE: _choice,
    Kind.SIZE: _size,
    Kind.YES: _yes,
}


def _wrong(question: Question, word: str, why: str) -> UsageError:
    return UsageError(
        f"{question.key}: {word!r} is no answer to: {question.text}", why=why, next="Answer the question, or Ctrl-C."
    )


def validate_keys(answers: Answers, path: Path) -> None:
    """Every key of an answers file belongs to a question.

    Raises:
        UsageError: one does not; it names the nearest that does.
    """
    job = answers.get("job")
    jobs = [row for row in JOBS if job in (None, row.key)] or list(JOBS)
    questions = [*FIRST, RUN, *(question for row in jobs for question in row.questions)]
    known = list(dict.fromkeys(question.key for question in questions))
    for key in answers:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UsageError(
                f"{str(path)!r} has an unknown answer {str(key)!r}",
                why=f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}.",
                next="Mend the file, or answer the questions: ollama-forge wizard",
            )


def command_line(
    job: WizardJob,
    answers: Mapping[str, str],
    store_path: Path | None = None,
    *,
    is_gguf: bool = True,
    is_quantized: bool = False,
) -> list[str]:
    """The one command that does what was answered; what was left at its default is left out.

    Args:
        is_gguf: the model is one; else a folder or a repo of safetensors, which is quantized while it is imported.
        is_quantized: it has few bits already, which `quantize` must be told to accept.
    """
    words = [*job.words, *job.model_words, answers["model"], "--name", answers["name"]]
    if job.key == "quantize" and not is_gguf:
        words = ["import", answers["model"], "--name", answers["name"]]
    elif job.key == "quantize" and is_quantized:
        words.append("--allow-requantize")
    for question in job.questions:
        answer = answers.get(question.key, "")
        is_default = answer == question.default and question.kind in (Kind.YES, Kind.NUMBER, Kind.COUNT)
        if not answer or is_default:
            continue
        words += [question.flag] if question.kind is Kind.YES else [question.flag, answer]
    if answers.get("replace") == "yes":
        words.append("--force")
    if store_path is not None:
        words += ["--store", str(store_path)]
    return words
