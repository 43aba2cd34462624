"""Build llama.cpp's own programs, for those who want them: a pinned tag, its commit checked, all cores.

In: a folder, and a tag or a source folder that is there already. Out: the programs, each asked for its flags. Commands
are argv lists, with a filtered environment. The clone is made beside its place and moved there when it is checked; a
build that was killed goes on where it stood.
b8929 is commit 9d34231b...: https://github.com/ggml-org/llama.cpp/releases/tag/b8929
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import DigestError, ExistsError, ForgeError, NotFoundError, UsageError
from ollama_forge.files import make_folder, require_free_space, write_bytes
from ollama_forge.jobs.external_program import (
    Output,
    find_program,
    program_environment,
    quoted,
    read_output,
    run_program,
)
from ollama_forge.jobs.native_tools import NativeTool, find_native_tools, probe_tool
from ollama_forge.registry.registry_file import forge_home

REPOSITORY = "https://github.com/ggml-org/llama.cpp"
PINNED_TAG = "b8929"
PINNED_COMMIT = "9d34231bb89590ee760ae19ba665e7855cd4fd4e"
TARGETS = (
    *("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-gguf-split", "llama-completion", "llama-cli"),
    *("llama-export-lora", "llama-finetune", "llama-server"),
)
_OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
    *("-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF"),
)
_COMPILERS = ("c++", "g++", "clang++", "cl")
_BUILD_BYTES = 3_000_000_000
_STALE_SECONDS = 3600.0
_MARK = "ollama-forge-source.txt"
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUILD_ENVIRONMENT = re.compile(
    r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|GIT_SSL_CAINFO|CMAKE_[A-Z_]+|(C|CXX|LD|CUDA)FLAGS|CUDACXX|CCACHE_DIR"
)


@dataclass(frozen=True)
class SetupOptions:
    """What to build, and where.

    Attributes:
        folder: where the source (unless `source`) and the build lie.
        ref: the tag.
        commit: what the tag must be; empty: the pinned one for the pinned tag, else whatever the tag is now.
        source: build this folder's source instead; nothing is downloaded.
        cuda: build for NVIDIA cards (needs the CUDA toolkit).
        n_jobs: compilers at once; 0: one for each core.
        repository: where the tag is fetched from.
    """

    folder: Path
    ref: str = PINNED_TAG
    commit: str = ""
    source: Path | None = None
    cuda: bool = False
    n_jobs: int = 0
    repository: str = REPOSITORY

    @property
    def source_dir(self) -> Path:
        return self.source or self.folder / "source"

    @property
    def build_dir(self) -> Path:
        return self.folder / "build"

    @property
    def bin_dir(self) -> Path:
        return self.build_dir / "bin"

    @property
    def expected_commit(self) -> str:
        return self.commit or (PINNED_COMMIT if self.ref == PINNED_TAG else "")


@dataclass(frozen=True)
class SetupPlan:
    """The commands, in order."""

    options: SetupOptions
    commands: tuple[tuple[str, ...], ...]
    must_download: bool

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "folder": str(self.options.folder),
            "ref": None if self.options.source else self.options.ref,
            "commit": None if self.options.source else self.options.expected_commit or None,
            "source": str(self.options.source_dir),
            "download": self.must_download,
            "commands": [list(command) for command in self.commands],
        }

    def lines(self) -> list[str]:
        """As a person would type them."""
        return [quoted(command) for command in self.commands]


@dataclass(frozen=True)
class BuiltTools:
    """What came out; `commit` is empty for a source folder."""

    folder: Path
    bin_dir: Path
    commit: str
    tools: tuple[NativeTool, ...]

    @property
    def path_line(self) -> str:
        """What puts the programs on PATH."""
        return f'export PATH="{self.bin_dir}:$PATH"'

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "folder": str(self.folder),
            "bin": str(self.bin_dir),
            "commit": self.commit or None,
            "tools": [tool.document() for tool in self.tools],
            "path_line": self.path_line,
        }


def default_folder() -> Path:
    """Where the programs are built unless somebody says where."""
    return forge_home() / "llama.cpp"


def plan_setup(options: SetupOptions) -> SetupPlan:
    """The commands that a setup would run, after a look at what is there.

    Raises:
        UsageError: a tag or a commit that is none.
        NotFoundError: cmake, git or a C++ compiler is not on PATH; or the source folder holds no llama.cpp.
        ExistsError: the folder holds something else.
        DiskError: there is no room.
    """
    if not _REF.fullmatch(options.ref):
        raise UsageError(f"--ref {options.ref!r} is not a tag", next=f"Example: --ref {PINNED_TAG}")
    if options.commit and not _COMMIT.fullmatch(options.commit):
        raise UsageError(f"--commit {options.commit!r} is not a commit", next="It has 40 hexadecimal digits.")
    cmake = _require_program("cmake", "pip install cmake, or the package `cmake` of your system")
    if not any(find_program(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name):
        raise NotFoundError(
            "There is no C++ compiler on PATH",
            why="llama.cpp is built from source.",
            next="Debian, Ubuntu: sudo apt install build-essential   macOS: xcode-select --install",
        )
    must_download = _must_download(options)
    require_free_space(options.folder, _BUILD_BYTES if must_download else 0, "the build of llama.cpp")
    n_jobs = options.n_jobs or os.cpu_count() or 1
    source, build = str(options.source_dir), str(options.build_dir)
    commands: list[tuple[str, ...]] = []
    if must_download:
        git = _require_program("git", "the package `git` of your system, or give the source: --source FOLDER")
        quiet = ("-c", "advice.detachedHead=false")
        commands.append(
            (git, *quiet, "clone", "--depth", "1", "--branch", options.ref, "--", options.repository, source)
        )
        commands.append((git, "-C", source, "rev-parse", "HEAD"))
    cuda = ("-DGGML_CUDA=ON",) if options.cuda else ()
    commands.append((cmake, "-S", source, "-B", build, *_OPTIONS, *cuda))
    commands.append((cmake, "--build", build, "--config", "Release", "--parallel", str(n_jobs)))
    return SetupPlan(options, tuple(commands), must_download)


def _require_program(name: str, hint: str) -> str:
    path = find_program(name)
    if path is None:
        raise NotFoundError(f"{name} is not on PATH", why="It is needed to build llama.cpp.", next=f"Get it: {hint}")
    return str(path)


def _must_download(options: SetupOptions) -> bool:
    """Whether the source has to be fetched; a finished clone of the same tag is used again."""
    if options.source is not None:
        if not (options.source / "CMakeLists.txt").is_file():
            raise NotFoundError(
                f"{str(options.source)!r} holds no source of llama.cpp: there is no CMakeLists.txt",
                next=f"Name the folder of a clone of {REPOSITORY}, or leave --source out.",
            )
        return False
    mark = options.source_dir / _MARK
    if mark.is_file():
        there = mark.read_text(encoding="utf-8").split()
        if there[:1] == [options.ref] and options.expected_commit in ("", *there[1:2]):
            return False
        raise ExistsError(
            f"{str(options.source_dir)!r} holds llama.cpp {' '.join(there)!r}, not {options.ref!r}",
            next=f"Choose another --dir, or remove {options.folder} first.",
        )
    if options.source_dir.exists():
        raise ExistsError(
            f"{str(options.source_dir)!r} is there already, and was not made by setup-llama-cpp",
            next=f"Choose another --dir, or build it as it is: --source {options.source_dir}",
        )
    return True


def run_setup(plan: SetupPlan, say: Callable[[str], None], output: Output) -> BuiltTools:
    """Fetch, check, configure, build, and ask each program.

    Args:
        say: told each step.
        output: gets what the programs write.

    Raises:
        DigestError: the tag is another commit than it must be.
        ForgeError: a program failed; its last words are in the error.
    """
    options = plan.options
    make_folder(options.folder)
    commit = ""
    if plan.must_download:
        commit = _fetch(plan, say, output)
    elif options.source is None:
        commit = (options.source_dir / _MARK).read_text(encoding="utf-8").split()[1]
    configure, build = plan.commands[-2:]
    say("$ " + quoted(configure))
    _run(configure, options.folder, output)
    build = (*build, *_targets(options, build[0]))
    say("$ " + quoted(build))
    _run(build, options.folder, output)
    tools = _built(options)
    if not tools:
        raise ForgeError(
            f"The build ended, and there is no program in {str(options.bin_dir)!r}",
            why="The source made none of those that are known here: " + ", ".join(TARGETS),
            next=f"Look at {options.source_dir}, or build another tag: --ref {PINNED_TAG}",
        )
    return BuiltTools(options.folder, options.bin_dir, commit, tuple(tools))


def _fetch(plan: SetupPlan, say: Callable[[str], None], output: Output) -> str:
    options = plan.options
    clone, ask = plan.commands[:2]
    with _scratch(options.folder) as scratch:
        clone = (*clone[:-1], str(scratch / "source"))
        say("$ " + quoted(clone))
        _run(clone, options.folder, output)
        code, said = read_output((*ask[:2], str(scratch / "source"), *ask[3:]))
        commit = said.strip()
        if code != 0 or not _COMMIT.fullmatch(commit):
            raise DigestError(f"git does not say which commit it fetched: {said.strip()!r}", next="Run it again.")
        if options.expected_commit and commit != options.expected_commit:
            raise DigestError(
                f"The tag {options.ref!r} is commit {commit}, and {options.expected_commit} was expected",
                why="Somebody moved the tag, or what answers is not llama.cpp's repository. Nothing was built.",
                next="Take a tag and a commit that you trust: --ref TAG --commit COMMIT",
            )
        write_bytes(scratch / "source" / _MARK, f"{options.ref} {commit}\n".encode())
        (scratch / "source").rename(options.source_dir)
    word = "as pinned" if options.expected_commit else "not pinned: remember it, and give it as --commit next time"
    say(f"llama.cpp {options.ref} is commit {commit} ({word})")
    return commit


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    for left in folder.glob(".clone-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:  # of a clone that was killed
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".clone-", dir=folder) as name:
        yield Path(name)


def _targets(options: SetupOptions, cmake: str) -> tuple[str, ...]:
    """`--target ...` for those of the programs that this source can build; nothing (all of it) where it cannot say."""
    _, said = read_output((cmake, "--build", str(options.build_dir), "--target", "help"))
    known = set(re.findall(r"[\w.+-]+", said))
    wanted = [target for target in TARGETS if target in known]
    return ("--target", *wanted) if wanted else ()


def _run(command: tuple[str, ...], folder: Path, output: Output) -> None:
    environment = program_environment()
    environment.update({name: text for name, text in os.environ.items() if _BUILD_ENVIRONMENT.fullmatch(name.upper())})
    run_program(command, folder, output, failure=ForgeError, environment=environment)


def _built(options: SetupOptions) -> list[NativeTool]:
    ending = ".exe" if sys.platform == "win32" else ""
    folders = (options.bin_dir, options.bin_dir / "Release")
    paths = [(name, folder / (name + ending)) for name in TARGETS for folder in folders]
    return [probe_tool(name, path) for name, path in paths if path.is_file() and os.access(path, os.X_OK)]


def plan_conda() -> tuple[str, ...]:
    """The command that installs the programs with conda.

    Raises:
        NotFoundError: neither mamba nor conda is on PATH.
    """
    for name in ("mamba", "conda"):
        path = shutil.which(name)
        if path and Path(path).is_absolute():
            return (path, "install", "--yes", "--channel", "conda-forge", "llama.cpp")
    raise NotFoundError(
        "Neither mamba nor conda is on PATH",
        next="Build them instead: ollama-forge setup-llama-cpp",
    )


def run_conda(command: tuple[str, ...], output: Output) -> list[NativeTool]:
    """Install with conda, and ask what is on PATH then.

    Raises:
        ForgeError: it failed.
    """
    _run(command, Path.cwd(), output)
    return find_native_tools(TARGETS)
