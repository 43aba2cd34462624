"""SIGKILL all along a landing: the store stays whole, what was there stays there, and running again finishes."""

import shutil
from pathlib import Path

import pytest
from kill import count_events, kill_forks, run_and_kill
from tiny_gguf import write_tiny_gguf
from tiny_store import snapshot

from ollama_forge.store.catalog import Store
from ollama_forge.store.land import land
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.verify import verify_store

PREPARATION = """
from pathlib import Path
from ollama_forge.store.catalog import Store
from ollama_forge.store.discard import copy_model, remove_model
from ollama_forge.store.land import land
from ollama_forge.store.modelfile import Modelfile, Message
"""
WISHES = 'Modelfile(system="new", parameters=(("seed", 1),), messages=(Message("user", "hi"),))'
POINTS = 32
COMMANDS = {
    "a new model": f'land(Store(ROOT / "models"), "mine", model=ROOT / "new.gguf", modelfile={WISHES})',
    "from a base": f'store = Store(ROOT / "models"); land(store, "mine", model=store.find("tiny"), modelfile={WISHES})',
    "a replacement": (
        f'land(Store(ROOT / "models"), "tiny", model=ROOT / "new.gguf", modelfile={WISHES}, overwrite=True)'
    ),
    "written by us": (
        'store = Store(ROOT / "models")\n'
        'content = (ROOT / "new.gguf").read_bytes()\n'
        "with store.blobs.stage(len(content)) as staged:\n"
        "    for start in range(0, len(content), 1 << 15):\n"
        "        staged.write(content[start : start + (1 << 15)])\n"
        '    land(store, "mine", model=staged)\n'
    ),
    "a removal": 'remove_model(Store(ROOT / "models"), "neighbour") if Store(ROOT / "models").names()[1:] else None',
    "a copy": 'copy_model(Store(ROOT / "models"), "tiny", "second/name", overwrite=True)',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model and a neighbour that shares its weights, and a file to land."""
    root = tmp_path_factory.mktemp("world")
    write_tiny_gguf(root / "old.gguf")
    write_tiny_gguf(root / "new.gguf", seed=9)
    store = Store(root / "models")
    land(store, "tiny", model=root / "old.gguf", modelfile=Modelfile(system="old"))
    land(store, "neighbour", model=store.find("tiny"), modelfile=Modelfile(system="neighbour"))
    return root


def spread(n_events: int) -> list[int]:
    """At most `POINTS` events from the first to the last."""
    if n_events <= POINTS:
        return list(range(1, n_events + 1))
    return sorted({1 + round(index * (n_events - 1) / (POINTS - 1)) for index in range(POINTS)})


def copy_world(world: Path, target: Path) -> Path:
    shutil.copytree(world, target, symlinks=True)
    return target


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_event_the_store_is_whole_and_a_second_run_finishes(
    world: Path, tmp_path: Path, command: str
) -> None:
    code = COMMANDS[command]
    [whole] = kill_forks(PREPARATION, code, [(copy_world(world, tmp_path / "whole"), 0)])
    assert whole.returncode == 0, whole.stderr
    before = {name.display: Store(world / "models").find(name).digest for name in Store(world / "models").names()}
    after = {m.name.display: m.digest for m in Store(tmp_path / "whole" / "models").models()}
    points = spread(whole.n_events)
    assert len(points) >= (POINTS if command not in ("a removal", "a copy") else 4)
    roots = [copy_world(world, tmp_path / str(point)) for point in points]
    outcomes = kill_forks(PREPARATION, code, list(zip(roots, points, strict=True)))
    assert all(outcome.was_killed for outcome in outcomes)
    for root in roots:
        store = Store(root / "models")
        report = verify_store(store)
        assert report.is_whole, (root.name, report.problems)
        assert report.leftovers == ()
        state = {model.name.display: model.digest for model in store.models()}
        assert state in (before, after), root.name
    finished = kill_forks(PREPARATION, code, [(root, 0) for root in roots])
    for root, outcome in zip(roots, finished, strict=True):
        assert outcome.returncode == 0, outcome.stderr
        store = Store(root / "models")
        report = verify_store(store)
        assert report.is_whole and report.leftovers == (), root.name
        assert {model.name.display: model.digest for model in store.models()} == after
        if command not in ("a removal",):
            assert report.stages == (), root.name


def test_a_whole_command_is_killed_at_a_chosen_event(world: Path, tmp_path: Path) -> None:
    root = copy_world(world, tmp_path / "root")
    argv = ["-c", PREPARATION + "import sys\nROOT = Path(sys.argv[1])\n" + COMMANDS["from a base"], str(root)]
    before = snapshot(root / "models" / "manifests")
    outcome = run_and_kill(argv, 5, [root])
    assert outcome.was_killed and outcome.n_events == 5
    fresh = copy_world(world, tmp_path / "fresh")
    total = count_events([*argv[:2], str(fresh)], [fresh])
    assert total > 30
    assert not run_and_kill([*argv[:2], str(fresh)], total + 100, [fresh]).was_killed
    assert snapshot(root / "models" / "manifests").items() >= before.items()
