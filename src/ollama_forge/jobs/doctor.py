"""`doctor`: look deeply at everything that this tool depends on; for each thing how it stands, and what to type.

In: this machine. Out: frozen findings, in the order in which a newcomer needs them. It changes nothing and shows no
secret; programs are asked with a time limit, and torch is imported in a child process only, and only beside a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ollama_forge.jobs.doctor_machine import disk_findings, gpu_findings, memory_now_finding
from ollama_forge.jobs.doctor_store import server_findings, store_findings
from ollama_forge.jobs.environment import Finding, State, engine_finding, python_finding
from ollama_forge.jobs.external_program import quoted
from ollama_forge.jobs.native_tools import find_native_tools

PACKAGE = "ollama-forge"
EXTRAS = {"train": "training", "llama-cpp-converter": "llama.cpp's own converter"}
_SHOWN_VARIABLES = (
    "OLLAMA_MODELS",
    "OLLAMA_HOST",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OLLAMA_FORGE_HOME",
    "OLLAMA_FORGE_REGISTRY",
    "CUDA_VISIBLE_DEVICES",
)
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_EXTRA_OF = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def diagnose(store_path: Path | None = None) -> list[Finding]:
    """Everything, once."""
    return [
        python_finding(),
        *path_findings(os.environ),
        engine_finding(),
        packages_finding("", "packages"),
        *store_findings(store_path),
        *disk_findings(store_path),
        *server_findings(store_path),
        memory_now_finding(),
        *gpu_findings(),
        *[packages_finding(extra, name) for extra, name in EXTRAS.items()],
        token_finding(os.environ),
        environment_finding(os.environ),
        *tool_findings(),
    ]


def path_findings(environ: Mapping[str, str]) -> list[Finding]:
    """Whether the command is found under its name, is this one, and whether PATH is sane."""
    bin_dir = Path(sys.executable).parent
    found = shutil.which(PACKAGE, path=environ.get("PATH", ""))
    if found is None:
        own = Finding(
            "command",
            State.OPTIONAL,
            f"{PACKAGE} is not on PATH",
            f'export PATH="{bin_dir}:$PATH"   (add the line to your shell\'s start-up file to keep it)',
        )
    elif Path(found).parent.resolve() != bin_dir.resolve():
        own = Finding(
            "command",
            State.WARNING,
            f"{PACKAGE} on PATH is {found}, and this is another one, of {bin_dir}",
            f"{found} doctor   (looks at that one), or put {bin_dir} first on PATH",
        )
    else:
        own = Finding("command", State.OK, found)
    return [own, *_path_problem(environ.get("PATH", ""))]


def _path_problem(text: str) -> list[Finding]:
    problems = []
    for entry in dict.fromkeys(text.split(os.pathsep)):
        path = Path(entry)
        if entry.startswith("~"):
            problems.append(f"{entry!r} begins with ~, which only a shell understands")
        elif not path.is_absolute():
            problems.append(f"{entry!r} is relative: it means another folder wherever you are, and is not used here")
        elif _is_open_to_all(path):
            problems.append(f"{entry!r} may be written by everybody on this machine")
    if not problems:
        return []
    return [Finding("PATH", State.WARNING, "; ".join(problems), "Take these entries out of PATH, or mend them.")]


def _is_open_to_all(folder: Path) -> bool:
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return sys.platform != "win32" and bool(mode & stat.S_IWOTH)


def packages_finding(extra: str, name: str) -> Finding:
    """What the package itself needs (`extra` empty), or an optional part: which packages are missing or too old."""
    from packaging.requirements import Requirement

    missing, wrong, have = [], [], []
    for text in requirements_of(extra):
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if wanted.specifier.contains(version, prereleases=True):
            have.append(f"{wanted.name} {version}")
        else:
            wrong.append((text, f"{wanted.name} {version} is here, {wanted.specifier} is needed"))
    if not missing and not wrong:
        return Finding(name, State.OK, ", ".join(have))
    words = [f"not installed: {', '.join(Requirement(text).name for text in missing)}"] if missing else []
    command = pip_command([*missing, *(text for text, _ in wrong)])
    return Finding(
        name,
        State.OPTIONAL if extra else State.MISSING,
        "; ".join([*words, *(reason for _, reason in wrong)]),
        f"pip install '{PACKAGE}[{extra}]'" if extra else quoted(command),
        fix=command,
    )


def requirements_of(extra: str) -> list[str]:
    """What the package (`extra` empty) or one of its extras asks for, without the marker."""
    found = []
    for text in importlib.metadata.requires(PACKAGE) or []:
        requirement, _, marker = text.partition(";")
        match = _EXTRA_OF.search(marker)
        if (match[1] if match else "") == extra:
            found.append(requirement.strip())
    return found


def pip_command(requirements: list[str]) -> tuple[str, ...]:
    """The command that installs packages into this very environment: pip, or uv where pip is not there."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return ("uv", "pip", "install", "--python", sys.executable, *requirements)
    return (sys.executable, "-m", "pip", "install", *requirements)


def token_finding(environ: Mapping[str, str]) -> Finding:
    """Whether a token of the Hub is set, and where; never which."""
    for name in _TOKEN_VARIABLES:
        if environ.get(name, "").strip():
            return Finding("hub token", State.OK, f"set in {name}", facts={"present": True, "where": name})
    from huggingface_hub.constants import HF_TOKEN_PATH

    path = Path(HF_TOKEN_PATH)
    try:
        status = path.stat()
    except OSError:
        return Finding(
            "hub token",
            State.OPTIONAL,
            "none; needed only for gated and private models",
            "hf auth login",
            facts={"present": False},
        )
    facts = {"present": True, "where": str(path)}
    if sys.platform != "win32" and status.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        step = ("chmod", "600", str(path))
        return Finding(
            "hub token",
            State.WARNING,
            f"in {path}, which others on this machine may read",
            " ".join(step),
            facts=facts,
            fix=step,
        )
    return Finding("hub token", State.OK, f"in {path}", facts=facts)


def environment_finding(environ: Mapping[str, str]) -> Finding:
    """The variables that steer this tool, where they are set."""
    found = {name: _without_password(environ[name]) for name in _SHOWN_VARIABLES if environ.get(name)}
    words = ", ".join(f"{name}={value}" for name, value in found.items())
    return Finding("environment", State.OK, words or "nothing set, defaults everywhere", facts=found)


def _without_password(text: str) -> str:
    """An address keeps its host and loses whatever stands before the @."""
    parts = urlsplit(text) if "://" in text else None
    if parts is None or "@" not in parts.netloc:
        return text
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def tool_findings() -> list[Finding]:
    """llama.cpp's own programs on PATH, with the flags that they have. None of them is needed."""
    tools = find_native_tools()
    if not tools:
        return [
            Finding(
                "llama.cpp tools",
                State.OPTIONAL,
                "none on PATH; none is needed",
                f"{PACKAGE} setup-llama-cpp   (only if you want them)",
            )
        ]
    return [
        Finding(
            tool.name,
            State.OK if tool.answers else State.WARNING,
            tool.words(),
            "" if tool.answers else f"Run it yourself to see why: {tool.path} --help",
            facts=tool.document(),
        )
        for tool in tools
    ]
