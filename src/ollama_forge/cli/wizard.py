"""`wizard`: one sitting from the list of models to the finished one, ending in one command that can be typed again."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.options import console_options, store_option
from ollama_forge.cli.wizard_jobs import (
    FIRST,
    RUN,
    Kind,
    Question,
    WizardJob,
    command_line,
    offered_jobs,
    parse_answer,
    validate_keys,
)
from ollama_forge.errors import ForgeError, InterruptedRunError, UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.model_fits import ModelFits

_COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "unknown": "cyan"}
_MODEL, _NAME, _REPLACE, _JOB = FIRST


@click.command("wizard", epilog="Examples: ollama-forge wizard   |   ollama-forge wizard --answers answers.yaml")
@click.option("--answers", "answers_path", type=click.Path(path_type=Path), help="Answers from a YAML or JSON file.")
@click.option("--save-answers", "save_path", type=click.Path(path_type=Path), help="Keep the answers in this file.")
@click.option("--dry-run", is_flag=True, help="Run the command with its own --dry-run: exact, changing nothing.")
@store_option
@console_options
def command(
    answers_path: Path | None, save_path: Path | None, dry_run: bool, store_path: Path | None, console: Console
) -> int:
    """Choose a model, a name and a job; see whether it fits; get the one command for it; run it.

    It asks at a terminal. Elsewhere, or to do the same again, the answers come from a file. Ctrl-C keeps them.
    """
    sitting = Sitting(console, store_path, save_path)
    if answers_path is not None:
        sitting.given = read_answers(answers_path)
    elif not sitting.may_ask:
        raise UsageError(
            "wizard asks questions, and nobody is there to answer",
            why="It is not at a terminal." if not console.as_json else "--json prints one document and asks nothing.",
            next="Give the answers in a file: ollama-forge wizard --answers answers.yaml",
        )
    with sitting.keeping_answers():
        argv = sitting.hold()
    if argv is None:
        return 0
    if dry_run:
        argv = [*argv, "--dry-run"]
    code = sitting.run(argv)
    if code == InterruptedRunError.exit_code:
        console.say(f"  or, from your answers: ollama-forge wizard --answers {shlex.quote(str(sitting.keep()))}")
    return code


def read_answers(path: Path) -> dict[str, Any]:
    """The answers of a file.

    Raises:
        UsageError: it cannot be read, or holds a key that no question has.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise UsageError(
            f"The answers in {str(path)!r} could not be read",
            why=getattr(exc, "strerror", None) or " ".join(str(exc).split()),
            next="It is YAML or JSON, one `key: answer` a line, for example `model: llama3.2`.",
        ) from exc
    if not isinstance(document, dict):
        raise UsageError(f"{str(path)!r} holds no answers", next="Write one a line, for example `model: llama3.2`.")
    validate_keys(document, path)
    return document


class Sitting:
    """The questions of one sitting and what was answered.

    Args:
        save_path: where the answers are kept in any case; else only Ctrl-C keeps them, in the home of this tool.
    """

    def __init__(self, console: Console, store_path: Path | None, save_path: Path | None) -> None:
        self.console = console
        self.store_path = store_path
        self.save_path = save_path
        self.given: dict[str, Any] = {}
        self.answers: dict[str, str] = {}
        self.fits: ModelFits | None = None
        self.may_ask = sys.stdin.isatty() and not console.as_json

    @contextlib.contextmanager
    def keeping_answers(self) -> Iterator[None]:
        """Write the answers down when the sitting ends, however it ends."""
        try:
            yield
        except (KeyboardInterrupt, click.Abort) as exc:
            path = self.keep()
            raise InterruptedRunError(
                "Interrupted.",
                why=f"Your {len(self.answers)} answers are kept in {path}. Nothing was changed.",
                next=f"Go on: ollama-forge wizard --answers {shlex.quote(str(path))}",
            ) from exc
        if self.save_path is not None:
            self.console.say(f"Answers: {self._save(self.save_path)}")

    def keep(self) -> Path:
        """Write the answers where they can be found again."""
        from ollama_forge.registry.registry_file import forge_home

        return self._save(self.save_path or forge_home() / "wizard-answers.yaml")

    def _save(self, path: Path) -> Path:
        import yaml

        from ollama_forge.files import make_folder, write_bytes

        make_folder(path.absolute().parent)
        text = yaml.safe_dump(dict(self.answers), sort_keys=False, allow_unicode=True) if self.answers else "{}\n"
        write_bytes(path.absolute(), text.encode(), overwrite=True)
        return path

    def hold(self) -> list[str] | None:
        """Ask everything; the command line, or None when the last answer was not to run it."""
        self._choose_model()
        self._choose_name()
        job = self._choose_job()
        for question in job.questions:
            self.ask(question)
        assert self.fits is not None
        argv = command_line(
            job,
            self.answers,
            self.store_path,
            is_gguf=self.fits.is_gguf,
            is_quantized=self.fits.is_quantized,
        )
        if "--allow-requantize" in argv:
            self.console.warn(
                f"{self.answers['model']} is {self.fits.quantization} already: what that lost stays lost. "
                "From a 16-bit source the result would be better."
            )
        self._show_summary(job, argv)
        return argv if self.ask(RUN) == "yes" else None

    def ask(self, question: Question, default: str | None = None, *, is_listed: bool = False) -> str:
        """An answer: from the file, else from the person, else the default.

        Args:
            default: instead of the question's own.
            is_listed: its choices were shown already.

        Raises:
            UsageError: the file's answer is none; or there is none, and nobody to ask.
        """
        shown = question.default if default is None else default
        if question.key in self.given:
            word = parse_answer(question, self.given.pop(question.key))
        elif not self.may_ask:
            if shown is None:
                raise UsageError(
                    f"The answers lack {question.key!r}: {question.text}",
                    why=f"It must be {question.kind.value}, and nobody is there to ask.",
                    next=f"Add a line `{question.key}: ...` to the file.",
                )
            word = shown
        else:
            word = self._ask_person(question, shown, is_listed)
        self.answers[question.key] = word
        return word

    def _ask_person(self, question: Question, default: str | None, is_listed: bool) -> str:
        for number, choice in enumerate(() if is_listed else question.choices, 1):
            self.console.say(f"  {number}  {choice}")
        while True:
            words = question.text if default != "" else f"{question.text} (Enter: nothing)"
            suffix = " " if words.endswith("?") and not default else ": "
            text = click.prompt(words, default=default, show_default=bool(default), err=True, prompt_suffix=suffix)
            try:
                return parse_answer(question, text)
            except UsageError as error:
                self.console.warn(error.why or error.what)

    def _choose_model(self) -> None:
        from ollama_forge.jobs.model_fits import fit_ref, fits_of_store

        rows = fits_of_store(self.store_path) if self.may_ask or str(self.given.get("model", "")).isdecimal() else []
        if self.may_ask:
            _show_models(self.console, rows)
        while True:
            word = self.ask(_MODEL)
            if word.isdecimal() and 1 <= int(word) <= len(rows):
                word = rows[int(word) - 1].name
            try:
                self.fits = fit_ref(word, self.store_path)
            except ForgeError as error:
                if not self.may_ask:
                    raise
                self.console.warn(f"{error.what}. {error.why}")
                continue
            self.answers["model"] = word
            return

    def _choose_name(self) -> None:
        from ollama_forge.store.catalog import open_store
        from ollama_forge.store.name import parse_name, validate_writable

        store = open_store(self.store_path)
        assert self.fits is not None
        while True:
            word = self.ask(_NAME, self.fits.suggestion if self.may_ask else None)
            try:
                validate_writable(parse_name(word))
                is_taken = store.read_manifest_bytes(store.canonical(word)) is not None
            except ForgeError as error:
                if not self.may_ask:
                    raise
                self.console.warn(f"{error.what}. {error.why}")
                continue
            if not is_taken or self.ask(_REPLACE) == "yes":
                return
            if not self.may_ask:
                raise UsageError(
                    f"There is a model {word!r} already",
                    next="Choose another name, or add a line `replace: yes` to the answers.",
                )

    def _choose_job(self) -> WizardJob:
        jobs = offered_jobs()
        if self.may_ask and "job" not in self.given and self.fits is not None:
            for number, job in enumerate(jobs, 1):
                fit = self.fits.fits.get(job.fit)
                light = _light(fit.light) if fit else _light("unknown")
                needs = f"about {human_bytes(fit.needed_bytes)} of memory" if fit else self.fits.why_not(job.fit)
                self.console.say(f"  {number}  {light} {job.key:<11} {job.title}; {needs}")
        question = Question(_JOB.key, _JOB.text, Kind.CHOICE, None, choices=tuple(job.key for job in jobs))
        key = self.ask(question, is_listed=True)
        return next(job for job in jobs if job.key == key)

    def _show_summary(self, job: WizardJob, argv: Sequence[str]) -> None:
        self.console.say("")
        for key, answer in self.answers.items():
            if answer:
                self.console.say(f"  {key:<11} {answer}")
        fit = self.fits.fits.get(job.fit) if self.fits else None
        if fit is not None:
            free = human_bytes(fit.available_bytes) if fit.available_bytes else "unknown"
            place = "on the card" if fit.on_gpu else "of memory"
            self.console.say(
                f"  {'fit':<11} {_light(fit.light)} about {human_bytes(fit.needed_bytes)} {place}, {free} free"
            )
            if fit.light == "red":
                self.console.warn("It will probably not fit. Close programs, or choose a smaller model or context.")
        self.console.say("")
        self.console.say("The same, as one command:")
        self.console.say(f"  {shlex.join(['ollama-forge', *argv])}")
        self.console.say("")

    def run(self, argv: list[str]) -> int:
        """Run the command in this process; with --json its document becomes part of the wizard's."""
        from ollama_forge.cli import main

        if not self.console.as_json:
            return main([*argv, "--quiet"] if self.console.is_quiet else argv)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main([*argv, "--json"])
        document: dict[str, Any] = {"answers": self.answers, "command": ["ollama-forge", *argv]}
        if self.fits is not None:
            document["fits"] = {name: fit.document() for name, fit in self.fits.fits.items()}
        self.console.result({**document, **_outcome(out.getvalue())})
        return code


def _outcome(text: str) -> dict[str, Any]:
    """The inner command's document: its error as the error, anything else as the result."""
    document = json.loads(text)
    if isinstance(document, dict) and "error" in document:
        return {"error": document["error"]}
    return {"result": document}


def _light(light: str) -> str:
    """A dot with its word, so that it can be told without colours."""
    return click.style(f"● {light}", fg=_COLOURS[light])


def _show_models(console: Console, rows: Sequence[ModelFits]) -> None:
    if not rows:
        console.say("There are no models in the store yet. Name a path or hf:org/repo, or get one: ollama-forge start")
        return
    cells = [["", "MODEL", "PARAMETERS", "QUANT", "SIZE", "TO RUN", "TO FINE-TUNE"]]
    for number, row in enumerate(rows, 1):
        size, count = human_bytes(row.size_bytes), human_count(row.parameters) if row.parameters else "-"
        lights = [_words(row, job) for job in ("run", "finetune")]
        cells.append([str(number), row.name, count, row.quantization or "-", size, *lights])
    widths = [max(len(click.unstyle(line[column])) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        padded = [cell + " " * (width - len(click.unstyle(cell))) for cell, width in zip(line, widths, strict=True)]
        console.say("  ".join(padded).rstrip())


def _words(row: ModelFits, job: str) -> str:
    fit = row.fits.get(job)
    if fit is None:
        return row.problem if job == "run" and row.problem else "-"
    return f"{_light(fit.light)} {human_bytes(fit.needed_bytes)}"
