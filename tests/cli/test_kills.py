"""SIGKILL at every few events of each writing command: the store stays valid, and running again finishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json
from kill import kill_forks

from ollama_forge.store.catalog import open_store
from ollama_forge.store.verify import verify_store

COMMANDS = {
    "import": f'["import", {str(DEMO_MODEL)!r}, "--name", "new", "--quant", "Q8_0", "--no-check", '
    '"--store", ROOT / "s"]',
    "create-from-base": '["create-from-base", "--base", "base", "--name", "new", "--system", "Hi.", "--force", '
    '"--no-check", "--store", ROOT / "s"]',
    "quantize": '["quantize", ROOT / "f.gguf", "-o", ROOT / "new.gguf", "--type", "Q8_0", "--threads", "1", "--force"]',
}
PREPARATION = """
import contextlib, io
from ollama_forge.cli import main
import ollama_forge.jobs.creation, ollama_forge.jobs.conversion
"""
RUN = """
with contextlib.redirect_stdout(io.StringIO()):
    status = main([str(word) for word in {argv}])
assert status == 0, status
"""
POINTS = 36


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is before a command: a store with a model, and a GGUF."""
    folder = tmp_path_factory.mktemp("origin")
    forge_json("convert", DEMO_MODEL, "-o", folder / "f.gguf")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder / "s")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_anywhere_it_leaves_a_whole_store_and_can_run_again(command: str, origin: Path, tmp_path: Path) -> None:
    code = RUN.format(argv=COMMANDS[command])
    whole = tmp_path / "whole"
    shutil.copytree(origin, whole)
    (total,) = (outcome.n_events for outcome in kill_forks(PREPARATION, code, [(whole, 0)]))
    points = sorted({1 + index * (total - 1) // (POINTS - 1) for index in range(POINTS)})
    roots = [tmp_path / str(point) for point in points]
    for root in roots:
        shutil.copytree(origin, root)
    outcomes = kill_forks(PREPARATION, code, list(zip(roots, points, strict=True)))
    assert all(outcome.was_killed for outcome in outcomes)
    for root in roots:
        assert_unharmed(root, origin)
    for root, again in zip(roots, kill_forks(PREPARATION, code, [(root, 0) for root in roots]), strict=True):
        assert again.returncode == 0, again.stderr
        assert_unharmed(root, origin)
        assert finished(root) == finished(whole)
        shutil.rmtree(root)


def assert_unharmed(root: Path, origin: Path) -> None:
    report = verify_store(open_store(root / "s"))
    assert report.is_whole, report.problems
    assert (root / "f.gguf").read_bytes() == (origin / "f.gguf").read_bytes()
    new = root / "new.gguf"
    if new.exists():
        assert forge_json("show", new)["quantization"] == "Q8_0"


def finished(root: Path) -> tuple[object, ...]:
    """What a finished run leaves: every model's digest, and every file that is no leftover."""
    models = {model.name.display: model.digest for model in open_store(root / "s").models()}
    files = sorted(path.name for path in root.iterdir())
    return models, files, sorted(path.name for path in (root / "s" / "blobs").iterdir())
