"""Where the registry lies, who may write, and what a killed writer leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ollama_forge.errors import RegistryError
from ollama_forge.registry.document import Document, RegistryEntry, parse_document
from ollama_forge.registry.registry_file import (
    backup_path,
    find_registry,
    lock_registry,
    read_registry,
    restore_backup,
    update_registry,
)


def adding(name: str) -> object:
    return lambda document: document.with_models({**document.models, name: RegistryEntry(name=name)})


def test_the_place_is_the_option_then_the_variable_then_the_home(tmp_path: Path) -> None:
    environ = {"OLLAMA_FORGE_HOME": str(tmp_path / "home"), "OLLAMA_FORGE_REGISTRY": str(tmp_path / "r.json")}
    assert find_registry(tmp_path / "x.json", environ) == tmp_path / "x.json"
    assert find_registry(None, environ) == tmp_path / "r.json"
    del environ["OLLAMA_FORGE_REGISTRY"]
    assert find_registry(None, environ) == tmp_path / "home" / "model_registry.json"
    assert find_registry(None, {}) == Path.home() / ".ollama-forge" / "model_registry.json"


def test_a_missing_file_is_an_empty_registry_and_reading_makes_none(tmp_path: Path) -> None:
    assert read_registry(tmp_path / "r.json") == Document()
    assert list(tmp_path.iterdir()) == []


def test_a_change_leaves_the_file_its_last_version_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    update_registry(path, adding("one"))
    first = path.read_bytes()
    update_registry(path, adding("two"))
    assert backup_path(path).read_bytes() == first
    assert set(read_registry(path).models) == {"one", "two"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.json.bak"]


def test_a_change_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    update_registry(path, adding("one"))
    update_registry(path, adding("two"))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    update_registry(path, lambda document: document)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_the_last_version_comes_back_and_goes_again(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(RegistryError):
        restore_backup(path)
    update_registry(path, adding("one"))
    update_registry(path, adding("two"))
    assert set(restore_backup(path).models) == {"one"}
    assert set(read_registry(path).models) == {"one"}
    assert set(restore_backup(path).models) == {"one", "two"}


def test_a_broken_registry_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{")
    with pytest.raises(RegistryError):
        update_registry(path, adding("one"))
    assert path.read_text() == "{"


def test_the_lock_keeps_a_second_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    code = (
        "import sys, pathlib\n"
        "from ollama_forge.errors import RegistryError\n"
        "from ollama_forge.registry.registry_file import lock_registry\n"
        "try:\n"
        "    with lock_registry(pathlib.Path(sys.argv[1]), 0.2): print('in')\n"
        "except RegistryError as error: print('out')\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with lock_registry(path):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "out"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "in"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    code = (
        "import sys, pathlib, time\n"
        "from ollama_forge.registry.registry_file import lock_registry\n"
        "with lock_registry(pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "in"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    update_registry(path, adding("one"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json"]
    assert set(parse_document(path.read_bytes()).models) == {"one"}
