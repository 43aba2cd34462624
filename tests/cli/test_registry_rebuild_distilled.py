"""What a teacher taught is made again with the same digest; what cannot be is refused before any work."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learnt_model as world
import pytest
from command import DEMO_MODEL, forge, forge_json
from loopback_ollama import LoopbackOllama
from tiny_store import snapshot

from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import Store
from ollama_forge.store.name import parse_name

SHORT = ("--epochs", "1", "--max-steps", "2", "--batch-size", "4", "--grad-accum", "1", "--max-length", "64")
SHORT += ("--rank", "4", "--lr", "1e-3", "--seed", "7", "--no-check")
SAID = ("--system", 'Be "brief".', "--temperature", "0.5", "--stop", "###", "--message", "user=Hello")
OPTIONS = {
    "a layer": ("--loss", "jsd", "--beta", "0.3", "--kd-temperature", "2", "--val-split", "0.1"),
    "merged": ("--merge", "--ce-weight", "0.2"),
    "all weights, quantized": ("--full", "--cache", "--cache-words", "16", "--quant", "Q8_0"),
    "its own answers": ("--on-policy", "1", "--on-policy-tokens", "4", "--learn", "assistant"),
    "the teacher's answers": ("--generate", "--answer-tokens", "6"),
    "the teacher's words": ("--align", "text", "--answer-tokens", "6"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, and a store with a teacher that says something and a student that was cut from it."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    draw = random.Random(5)
    talks = [json.dumps({"messages": world.training_conversation(draw)}) for _ in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.jsonl").write_text("\n".join(talks[:8]) + "\n")
    (tmp_path / "data" / "two.jsonl").write_text("\n".join(talks[8:]) + "\n")
    forge_json("import", DEMO_MODEL, "--name", "big", "--quant", "none", *SAID, "--no-check")
    forge_json("downsize", "prune", "big", "--drop-layers", "1", "--name", "cut", "--no-check")
    return tmp_path


def distill(place: Path, *more: object) -> Any:
    """Distil into `pupil`, and take the working folder away."""
    words = ("--data", place / "data", "--name", "pupil", "--workdir", place / "work", *SHORT)
    done = forge_json("downsize", "distill", *words, *more)
    shutil.rmtree(place / "work")
    return done


def refusal(*argv: object) -> dict[str, str]:
    ended = forge("registry", "rebuild", "pupil", *argv, "--json")
    assert ended.code == 1
    error: dict[str, str] = ended.document["error"]
    assert error["why"] or error["next"]
    return error


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_distillation_is_made_again_though_its_folder_is_gone(place: Path, kind: str) -> None:
    distill(place, "--teacher", "big", "--student", "cut", "--system", "Teach.", *OPTIONS[kind])
    before = snapshot(place)
    rebuilt = forge_json("registry", "rebuild", "pupil")
    assert rebuilt["same"] is True and rebuilt["digest"] == f"sha256:{Store(place / 'models').find('pupil').digest}"
    assert [step["step"] for step in rebuilt["steps"]] == ["distill"]
    assert snapshot(place) == before


@pytest.mark.parametrize("more", [(), ("--full",), ("--generate", "--answer-tokens", "6")])
def test_a_student_made_of_its_teacher_says_what_the_teacher_says_and_is_made_again(
    place: Path, more: tuple[str, ...]
) -> None:
    distill(place, "--teacher", "big", "--student-layers", "2", "--message", "assistant=Hi!", *more)
    said = resolve("pupil").modelfile
    assert (said.system, dict(said.parameters)) == ('Be "brief".', {"stop": ("###",), "temperature": 0.5})
    assert [turn.content for turn in said.messages] == ["Hello", "Hi!"]
    assert forge_json("registry", "rebuild", "pupil")["same"] is True


def test_files_and_folders_are_known_by_their_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed as relative paths, in a folder whose name could be an organization on the Hub."""
    monkeypatch.chdir(place)
    shutil.copytree(DEMO_MODEL, place / "teacher")
    forge_json("downsize", "prune", "big", "--drop-layers", "1", "-o", "cut.gguf")
    (place / "org").mkdir()
    (place / "cut.gguf").rename(place / "org" / "cut.gguf")
    distill(place, "--teacher", "./teacher", "--student", "org/cut.gguf")
    monkeypatch.chdir(place.parent)
    assert forge_json("registry", "rebuild", "pupil")["same"] is True
    origin = forge_json("registry", "lineage", "pupil")["parents"]
    assert [one["role"] for one in origin[:4]] == ["base", "teacher", "data", "data"]
    assert all(one["digest"].startswith("sha256:") for one in origin)
    for path in ("data/two.jsonl", "org/cut.gguf", "teacher/config.json"):
        kept = (place / path).read_bytes()
        (place / path).write_bytes(kept + b"\n")
        before = snapshot(place)
        for options in ((), ("--dry-run",)):
            error = refusal(*options)
            assert str(place / path).startswith(error["what"].split("'")[1]) and "another one" in error["what"]
        assert snapshot(place) == before
        (place / path).write_bytes(kept)
    shutil.rmtree(place / "teacher")
    assert "teacher" in refusal()["what"] and "is gone" in refusal()["what"]


def edit_registry(place: Path, change: Callable[[Any], object]) -> None:
    path = place / "forge" / "model_registry.json"
    registry = json.loads(path.read_text())
    change(registry)
    path.write_text(json.dumps(registry))


def keep_one_record(registry: Any) -> None:
    """As if all but `pupil` had been pulled by Ollama, and nobody had imported it."""
    for part, name in (("models", lambda entry: entry["name"]), ("lineage", lambda entries: entries[0]["name"])):
        registry[part] = {key: value for key, value in registry[part].items() if name(value).startswith("pupil")}


def test_a_teacher_that_was_only_pulled_needs_no_entry_of_its_own(place: Path) -> None:
    distill(place, "--teacher", "big", "--student", "cut")
    edit_registry(place, keep_one_record)
    assert forge_json("registry", "rebuild", "pupil")["same"] is True


def test_a_teacher_is_found_by_its_digest_whatever_its_name_is(place: Path) -> None:
    distill(place, "--teacher", "big", "--student", "cut")
    edit_registry(place, keep_one_record)
    store = Store(place / "models")
    big, kept = (store.manifest_path(parse_name(name)) for name in ("big", "kept"))
    kept.parent.mkdir()
    shutil.copyfile(big, kept)
    forge_json("create-from-base", "--base", "big", "--name", "big", "--force", "--system", "Other.", "--no-check")
    error = refusal()
    assert "no longer has the teacher 'big:latest'" in error["what"] and "registry import" in error["next"]
    forge_json("registry", "import")
    assert forge_json("registry", "rebuild", "pupil")["same"] is True


def test_the_whole_way_makes_teacher_and_student_again_too(place: Path) -> None:
    distill(place, "--teacher", "big", "--student", "cut")
    rebuilt = forge_json("registry", "rebuild", "pupil", "--whole")
    assert rebuilt["same"] is True
    assert [step["step"] for step in rebuilt["steps"]] == ["import", "prune", "distill"]


def test_what_a_server_taught_is_refused_with_a_way_that_works(place: Path) -> None:
    prompts = place / "prompts.txt"
    prompts.write_text("".join(f"{example.question}\n" for example in world.new_facts()[:8]))
    words = ("downsize", "distill", "--data", prompts, "--name", "pupil", "--workdir", place / "work", *SHORT)
    with LoopbackOllama(place / "server", answer=lambda _name, _messages: "Yes.") as server:
        forge_json("import", DEMO_MODEL, "--name", "wise", "--host", server.url, "--no-check")
        forge_json(*words, "--teacher", "wise", "--student", "cut", "--align", "text", "--teacher-host", server.url)
        n_requests = len(server.requests)
        error = refusal()
        assert len(server.requests) == n_requests
    assert "'wise'" in error["what"] and server.url in error["what"] and "not on this disk" in error["why"]
    argv = error["next"].split("ollama-forge ")[1].replace("NAME", "again").split()
    assert str(place / "work" / "answers" / "answers.jsonl") in argv
    assert forge_json(*argv, *SHORT, "--workdir", place / "again")["landed"]["name"] == "again:latest"


@pytest.mark.parametrize(("changed", "says"), [({"merge": None}, "without merge"), ({"processes": 2}, "2 processes")])
def test_a_record_that_says_too_little_or_of_several_processes_is_refused(
    place: Path, changed: dict[str, Any], says: str
) -> None:
    distill(place, "--teacher", "big", "--student", "cut")

    def change(registry: Any) -> None:
        record = registry["lineage"][f"sha256:{Store(place / 'models').find('pupil').digest}"][0]
        merged = {**record["parameters"], **changed}
        record["parameters"] = {key: value for key, value in merged.items() if value is not None}

    edit_registry(place, change)
    error = refusal()
    assert says in error["what"] + error["why"] and "registry lineage pupil" in error["next"]
