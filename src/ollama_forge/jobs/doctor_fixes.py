"""What `doctor --fix` would run, and running it: each fix is one command, shown before it is run.

In: findings and what was asked for. Out: `Fix`es, and their programs' own words as they come.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.jobs.doctor import EXTRAS
from ollama_forge.jobs.environment import Finding, State
from ollama_forge.jobs.external_program import Output, program_environment, quoted, run_program

_INSTALL_ENVIRONMENT = re.compile(
    r"(PIP|UV)_[A-Z_]+|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|OLLAMA_FORGE_HOME"
)


@dataclass(frozen=True)
class Fix:
    """One command that mends one finding.

    Attributes:
        is_needed: it mends something that is wrong; else it adds something that some would like.
    """

    name: str
    reason: str
    command: tuple[str, ...]
    is_needed: bool

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "reason": self.reason,
            "command": list(self.command),
            "needed": self.is_needed,
        }

    @property
    def line(self) -> str:
        """As a person would type it."""
        return quoted(self.command)


def plan_fixes(
    findings: Sequence[Finding],
    *,
    extras: Sequence[str] = (),
    llama_cpp: bool = False,
    llama_cpp_dir: Path | None = None,
) -> list[Fix]:
    """What can be mended by a command: needs first, then what else is missing.

    Args:
        extras: optional parts that count as needed.
        llama_cpp: building llama.cpp's programs counts as needed.
        llama_cpp_dir: where they are built; None: where `setup-llama-cpp` builds them.
    """
    wanted = {EXTRAS[extra] for extra in extras}
    fixes = [
        Fix(
            finding.name,
            finding.detail,
            finding.fix,
            finding.state in (State.MISSING, State.WARNING) or finding.name in wanted,
        )
        for finding in findings
        if finding.fix
    ]
    if llama_cpp:
        where = ("--dir", str(llama_cpp_dir.absolute())) if llama_cpp_dir else ()
        command = (sys.executable, "-m", "ollama_forge", "setup-llama-cpp", *where)
        fixes.append(Fix("llama.cpp tools", "asked for with --fix-llama-cpp", command, True))
    return sorted(fixes, key=lambda fix: not fix.is_needed)


def apply_fix(fix: Fix, output: Output) -> None:
    """Run it.

    Raises:
        ForgeError: it could not be started, or failed; its last words are in the error.
    """
    environment = program_environment()
    environment.update(
        {name: text for name, text in os.environ.items() if _INSTALL_ENVIRONMENT.fullmatch(name.upper())}
    )
    run_program(fix.command, Path.cwd(), output, failure=ForgeError, environment=environment)
