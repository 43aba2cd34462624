"""Run the real command line in this process and look at what a person, or a script, would see."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ollama_forge
from ollama_forge.cli import main

SCRIPT_START = f"#!/bin/sh\n'''exec' {shlex.quote(sys.executable)} \"$0\" \"$@\"\n' '''\n"
"""First lines of a program in Python: a `#!` line cannot name an interpreter whose path has a space in it."""
DEMO_MODEL = Path(ollama_forge.__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What `--json` printed: exactly one document."""
        return json.loads(self.out)


def forge(*argv: object) -> Ended:
    """`ollama-forge argv...`"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Ended(code, out.getvalue(), err.getvalue())


def forge_json(*argv: object) -> Any:
    """The JSON document of a command that must succeed."""
    ended = forge(*argv, "--json")
    assert ended.code == 0, ended.out + ended.err
    return ended.document


def tree_hash(folder: Path) -> str:
    """One hash over the names, contents and times of everything below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(f"{path.relative_to(folder)} {path.lstat().st_mtime_ns}".encode())
        if path.is_file():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
