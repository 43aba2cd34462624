"""Every command, as somebody types it who does not know it: --help, no arguments, a typo, a file that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command import forge

from ollama_forge.cli import COMMANDS, root

NEEDS_NOTHING = {
    *(("check",), ("doctor",), ("list",), ("verify",), ("hf-cache", "ls")),
    *(("registry", "list"), ("registry", "import"), ("registry", "backfill"), ("registry", "verify")),
    *(("registry", "normalize"), ("registry", "purge-deprecated"), ("train-data", "init")),
}
"""Commands that do something useful without any argument; what they do there has tests of its own."""

RUNS_LONG = {("demo",), ("setup-llama-cpp",), ("start",), ("quickstart",)}
"""Commands that begin real work without any argument."""


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from walk(child, (*path, name))


def every_command() -> dict[tuple[str, ...], click.Command]:
    top = click.Context(root)
    found = {}
    for name in [name for group in COMMANDS.values() for name in group]:
        command = root.get_command(top, name)
        assert command is not None
        found.update(walk(command, (name,)))
    return found


ALL = every_command()
IDS = [" ".join(path) for path in ALL]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, home and store; no Ollama and no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


@pytest.mark.parametrize("path", ALL, ids=IDS)
def test_help_says_what_it_does_and_shows_an_example(path: tuple[str, ...]) -> None:
    ended = forge(*path, "--help")
    assert ended.code == 0 and f"ollama-forge {path[0]}" in ended.out
    command = ALL[path]
    assert (command.help or "").strip(), "it says what it does"
    is_example = "ollama-forge" in (command.epilog or "")
    assert is_example, f"{' '.join(path)} --help shows no example"


@pytest.mark.parametrize("path", [p for p in ALL if p not in NEEDS_NOTHING | RUNS_LONG], ids=lambda p: " ".join(p))
def test_without_arguments_it_says_what_it_needs(path: tuple[str, ...], nowhere: Path) -> None:
    ended = forge(*path)
    said = ended.out + ended.err
    assert ended.code == 2, said
    assert "Traceback" not in said
    if isinstance(ALL[path], click.Group):
        assert "Commands:" in said
    else:
        assert "✗ " in said and re.search(r"next: .*(ollama-forge|--)", said)
    assert [child.name for child in nowhere.iterdir()] == [], "nothing was made"


@pytest.mark.parametrize("path", ALL, ids=IDS)
def test_a_mistyped_option_is_named(path: tuple[str, ...], nowhere: Path) -> None:
    ended = forge(*path, "--jsno")
    assert ended.code == 2 and "--jsno" in ended.err and "next:" in ended.err
    if "No such option" in ended.err and any("--json" in option.opts for option in ALL[path].params):
        assert "--json" in ended.err.replace("--jsno", "")


@pytest.mark.parametrize("path", sorted(NEEDS_NOTHING), ids=lambda p: " ".join(p))
def test_on_an_empty_machine_it_ends_with_words_and_no_traceback(path: tuple[str, ...], nowhere: Path) -> None:
    ended = forge(*path)
    assert ended.code in (0, 1) and "Traceback" not in ended.err and (ended.out or ended.err).strip()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("quantize", "m.gguf", "-o", "x.gguf", "--type", "q4"), "Did you mean Q4_0 or Q4_1 or Q4_K_S or Q4_K_M?"),
        (("quantize", "m.gguf", "-o", "x.gguf", "--type", "Q4KM"), "Q4_K_M"),
        (("create-from-base", "--base", "m", "--name", "x", "--param", "temprature=1"), "Did you mean temperature?"),
        (("quantze", "m.gguf"), "Did you mean quantize?"),
        (("run",), 'ollama-forge run llama3.2 "Why is the sky blue?"'),
    ],
)
def test_what_was_probably_meant_is_said(argv: tuple[str, ...], says: str, nowhere: Path) -> None:
    ended = forge(*argv)
    assert ended.code == 2 and says in ended.err


MISSING_MODEL = (
    *(("show", "nowhere"), ("run", "nowhere", "Hello"), ("verify", "nowhere"), ("export", "nowhere", "-o", "x.gguf")),
    *(("quantize", "nowhere", "-o", "x.gguf", "--type", "Q8_0"), ("convert", "--gguf", "nowhere", "--name", "x")),
    *(("convert", "--gguf", "nowhere.gguf", "--name", "x", "--quant", "Q8_0"), ("convert", "nowhere", "-o", "x.gguf")),
    *(("import", "./nowhere", "--name", "x"), ("create-from-base", "--base", "nowhere", "--name", "x")),
    *(("create-from-base", "-f", "nowhere", "--name", "x"), ("train-resolve-base", "nowhere")),
    *(
        ("retrain", "--base", "nowhere", "--adapter", "./nowhere", "--name", "x"),
        ("merge", "nowhere", "a", "-o", "x.gguf"),
    ),
    *(
        ("finetune", "--data", "nowhere.jsonl", "--base", "nowhere", "--name", "x"),
        ("validate-training-data", "nowhere"),
    ),
    *(("train-data", "stats", "nowhere.jsonl", "--base", "nowhere"), ("adapters", "check", "x", "--base", "nowhere")),
    *(("prepare-training-data", "nowhere", "-o", "x"), ("convert-training-data-format", "nowhere", "-o", "x")),
    *(("registry", "show", "nowhere"), ("registry", "lineage", "nowhere"), ("registry", "deprecate", "nowhere")),
    *(("registry", "rebuild", "nowhere"), ("registry", "import-bundle", "nowhere"), ("wizard", "--answers", "nowhere")),
)


@pytest.mark.parametrize("argv", MISSING_MODEL, ids=lambda argv: " ".join(argv))
def test_what_is_not_there_is_named_with_the_next_step(argv: tuple[str, ...], nowhere: Path) -> None:
    ended = forge(*argv)
    assert ended.code in (1, 2), ended.out + ended.err
    said = ended.out + ended.err
    assert "nowhere" in said and "next:" in said and "Traceback" not in said
    assert not list(nowhere.glob("x*"))
