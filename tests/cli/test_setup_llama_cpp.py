"""`setup-llama-cpp`: a source folder and a tag are built into programs that answer; what does not agree is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from command import Ended, forge, forge_json

CMAKE = """cmake_minimum_required(VERSION 3.14)
project(tiny C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-quantize main.c)
add_executable(an-example broken.c)
"""
PROGRAM = """#include <stdio.h>
int main(void) { puts("usage: llama-quantize [--imatrix FILE] [--keep-split]"); return 1; }
"""
HAS_TOOLS = all(shutil.which(name) for name in ("cmake", "git")) and any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A CMake project that stands for llama.cpp's source."""
    folder = tmp_path / "a source"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "main.c").write_text(PROGRAM)
    (folder / "broken.c").write_text("Only the programs that are wanted are built, not this.\n")
    return folder


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def assert_needs_tools(ended: Ended) -> None:
    """What happens where a program to build with is missing: it is named, with how to get it."""
    assert ended.code == 1 and "not on PATH" in ended.err and "next:" in ended.err


def test_a_source_folder_is_built_without_a_network_and_its_programs_answer(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "tools"
    argv = ("setup-llama-cpp", "--source", source, "--dir", target)
    if not HAS_TOOLS:
        assert_needs_tools(forge(*argv))
        return
    built = forge_json(*argv)
    assert [tool["name"] for tool in built["tools"]] == ["llama-quantize"]
    assert built["tools"][0]["skills"] == ["takes an importance matrix", "keeps a split file split"]
    assert built["path_line"] == f'export PATH="{target}/build/bin:$PATH"' and built["commit"] is None
    assert sorted(path.name for path in source.iterdir()) == ["CMakeLists.txt", "broken.c", "main.c"]
    again = forge(*argv)
    assert again.code == 0 and "takes an importance matrix" in again.out


def test_a_tag_is_fetched_checked_kept_and_not_mixed_with_another(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "tools"
    base = ("setup-llama-cpp", "--dir", target, "--repository", f"file://{source}")
    if not HAS_TOOLS:
        assert_needs_tools(forge(*base, "--ref", "b1"))
        return
    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "commit", "-q", "-m", "one")
    git(source, "tag", "b1")
    commit = git(source, "rev-parse", "HEAD")
    killed = target / ".clone-of-yesterday" / "source"
    killed.mkdir(parents=True)
    os.utime(killed.parent, (0, 0))
    wrong = forge(*base, "--ref", "b1", "--commit", "0" * 40)
    assert wrong.code == 1 and commit in wrong.err and "Nothing was built" in wrong.err
    assert list(target.iterdir()) == []
    assert forge_json(*base, "--ref", "b1", "--commit", commit)["commit"] == commit
    (source / ".git").rename(tmp_path / "gone")
    assert forge_json(*base, "--ref", "b1")["commit"] == commit
    other = forge(*base, "--ref", "b2")
    assert other.code == 1 and "not 'b2'" in other.err


def test_a_dry_run_shows_commands_for_the_pinned_commit_and_runs_none(tmp_path: Path) -> None:
    target = tmp_path / "tools"
    ended = forge("setup-llama-cpp", "--dry-run", "--dir", target)
    if not HAS_TOOLS:
        assert_needs_tools(ended)
        return
    assert ended.code == 0 and "$ " in ended.out and not target.exists()
    plan = forge_json("setup-llama-cpp", "--dry-run", "--dir", target, "--jobs", 3)
    assert len(plan["commit"]) == 40 and plan["ref"].startswith("b") and plan["download"]
    assert plan["commands"][-1][-2:] == ["--parallel", "3"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--ref", "--upload-pack=x"), 2, "not a tag"),
        (("--ref", "b1", "--commit", "12"), 2, "40 hexadecimal"),
        (("--source", "nowhere"), 1, "CMakeLists.txt"),
        (("--source", ".", "--ref", "b1"), 2, "does not go together"),
        (("--use-system", "--cuda"), 2, "build nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    ended = forge("setup-llama-cpp", "--dir", tmp_path / "t", *words)
    assert ended.code in (code, 1 if not HAS_TOOLS else code) and "next:" in ended.err
    assert says in ended.err or not HAS_TOOLS
    assert not (tmp_path / "t").exists()


def test_a_missing_program_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = forge("setup-llama-cpp", "--dir", tmp_path / "t")
    assert ended.code == 1 and "cmake is not on PATH" in ended.err and "pip install cmake" in ended.err
    assert forge("setup-llama-cpp", "--use-conda").code == 1
    assert forge("setup-llama-cpp", "--use-system").code == 1


def test_a_failing_build_ends_with_its_own_words(source: Path, tmp_path: Path) -> None:
    if not HAS_TOOLS:
        return
    (source / "main.c").write_text("int main(void) { return nonsense; }\n")
    secret = {**os.environ, "HF_TOKEN": "hf_secret"}
    assert secret["HF_TOKEN"] not in forge("setup-llama-cpp", "--source", source, "--dir", tmp_path / "t").err
    ended = forge("setup-llama-cpp", "--source", source, "--dir", tmp_path / "t")
    assert ended.code == 1 and "nonsense" in ended.err and "exit code" in ended.err
