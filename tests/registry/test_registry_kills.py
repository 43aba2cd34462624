"""Writers that die at any moment, and writers that work at once: the file always parses and no entry is lost."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kill import kill_forks
from registry_stores import install

from ollama_forge.registry.document import Document, RegistryEntry, parse_document
from ollama_forge.registry.importing import plan_import
from ollama_forge.registry.inventory import read_store_inventory
from ollama_forge.registry.registry_file import read_registry, update_registry
from ollama_forge.store.catalog import Store

PREPARATION = """
from ollama_forge.registry.document import RegistryEntry
from ollama_forge.registry.registry_file import update_registry
def adding(name):
    return lambda document: document.with_models({**document.models, name: RegistryEntry(name=name)})
"""
CODE = 'update_registry(ROOT / "r.json", adding("new"))'
HOST = """
import os, pathlib, signal, sys
from ollama_forge.registry.document import Landing, RegistryEntry
from ollama_forge.registry.importing import plan_import
from ollama_forge.registry.inventory import read_store_inventory
from ollama_forge.registry.lifecycle import deprecate
from ollama_forge.registry.registry_file import update_registry
from ollama_forge.store.catalog import Store
registry, store, told = (pathlib.Path(word) for word in sys.argv[1:])

def land(document, name):
    landed = document.with_models({**document.models, name: RegistryEntry(name=name)})
    return landed.with_landing(name, Landing(name=name, step="create"))

def work(who, start):
    report = os.open(told / who, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(start, 1_000_000):
        name = f"{who}-{number}"
        update_registry(registry, lambda document: land(document, name))
        os.write(report, b".")
        update_registry(registry, lambda document: deprecate(document, [name]).document)
        inventory = read_store_inventory(Store(store))
        update_registry(registry, lambda document: plan_import(document, inventory).document)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    who, start = line.split()
    child = os.fork()
    if child == 0:
        try:
            work(who, int(start))
        finally:
            (told / "failed").touch()
            os._exit(1)
    print(child, flush=True)
"""
ROUNDS = 200
SECONDS = 20.0


def test_killed_at_each_step_of_a_change_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        update_registry(folder / "r.json", lambda _: Document(models={"a": RegistryEntry(name="a")}))
        update_registry(folder / "r.json", lambda d: d.with_models({**d.models, "b": RegistryEntry(name="b")}))
        return folder

    whole = fresh("whole")
    (done,) = kill_forks(PREPARATION, CODE, [(whole, 0)])
    assert done.returncode == 0, done.stderr
    roots = [fresh(str(point)) for point in range(1, done.n_events + 1)]
    outcomes = kill_forks(PREPARATION, CODE, [(root, point) for point, root in enumerate(roots, 1)])
    assert all(outcome.was_killed for outcome in outcomes)
    for root in roots:
        names = set(read_registry(root / "r.json").models)
        assert names in ({"a", "b"}, {"a", "b", "new"})
        backup = root / "r.json.bak"
        assert set(parse_document(backup.read_bytes()).models) in ({"a"}, {"a", "b"})
    for root, again in zip(roots, kill_forks(PREPARATION, CODE, [(root, 0) for root in roots]), strict=True):
        assert again.returncode == 0, again.stderr
        assert (root / "r.json").read_bytes() == (whole / "r.json").read_bytes()
        assert sorted(path.name for path in root.iterdir()) == ["r.json", "r.json.bak"]


def test_two_writers_that_are_killed_again_and_again_lose_nothing(tmp_path: Path) -> None:
    """Each writer lands, deprecates and imports in turn; what it reported as landed must be there for ever."""
    store, registry = tmp_path / "models", tmp_path / "r.json"
    for number in range(3):
        install(store, f"real:{number}b", filling=str(number).encode())
    told = tmp_path / "told"
    told.mkdir()
    chance, ends, rounds = random.Random(7), time.monotonic() + SECONDS, 0
    with _started_host(registry, store, told) as host:
        while rounds < ROUNDS and time.monotonic() < ends:
            reported = {who: _count(told / who) for who in ("one", "two")}
            pids = [_ask(host, f"{who} {count}") for who, count in reported.items()]
            time.sleep(chance.random() * 0.12)
            for pid in chance.sample(pids, 2):
                os.kill(pid, signal.SIGKILL)
                _wait_for_end(pid)
                if registry.exists():
                    parse_document(registry.read_bytes())
            rounds += 1
            _assert_whole(registry, {who: _count(told / who) for who in reported})
    assert not (told / "failed").exists()
    assert any(_count(told / who) for who in ("one", "two"))
    inventory = read_store_inventory(Store(store))
    document = update_registry(registry, lambda document: plan_import(document, inventory).document)
    assert sum(entry.presence == "present" for entry in document.models.values()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "r.json", "r.json.bak", "told"]


@contextlib.contextmanager
def _started_host(registry: Path, store: Path, told: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has imported everything, and forks a writer for each line that it is told."""
    command = [sys.executable, "-c", HOST, str(registry), str(store), str(told)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        yield host
        assert host.stdin is not None
        host.stdin.close()
        assert host.wait(timeout=30) == 0


def _ask(host: "subprocess.Popen[str]", line: str) -> int:
    assert host.stdin is not None
    assert host.stdout is not None
    host.stdin.write(line + "\n")
    host.stdin.flush()
    return int(host.stdout.readline())


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.002)


def _count(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _assert_whole(registry: Path, reported: dict[str, int]) -> None:
    document = read_registry(registry)
    wanted = {f"{who}-{number}" for who, count in reported.items() for number in range(count)}
    assert wanted <= set(document.models)
    assert wanted <= set(document.lineage)
