"""The programs of llama.cpp that are on PATH, and what each of them really can: asked, not believed from its name.

In: names. Out: frozen facts. Each program is run with `--help` and `--version`, with a time limit; none is needed.
The flags are those of tools/quantize, tools/imatrix, tools/perplexity and the two fine-tuning programs of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.jobs.external_program import find_program, has_flag, read_help, read_output

_VERSION_TIMEOUT_SECONDS = 10.0
_VERSION = re.compile(r"^version: (\d+) \(([0-9a-f]{7,40})\)", re.MULTILINE)
_LONG_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?![\w-])")

_SKILLS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama-quantize": (
        ("--imatrix", "takes an importance matrix"),
        ("--tensor-type", "a type for each tensor"),
        ("--keep-split", "keeps a split file split"),
        ("--prune-layers", "drops layers"),
    ),
    "llama-imatrix": (("--chunks", "measures importance"), ("--output-format", "writes it as GGUF")),
    "llama-perplexity": (("--perplexity", "perplexity"), ("--kl-divergence", "KL divergence")),
    "llama-finetune": (("--lora-out", "trains a LoRA"), ("--learning-rate", "trains all weights (float32 only)")),
    "finetune": (("--lora-out", "trains a LoRA"), ("--learning-rate", "trains all weights (float32 only)")),
    "llama-gguf-split": (("--merge", "joins a split file"),),
    "llama-export-lora": (("--lora", "merges a LoRA"),),
    "llama-cli": (("--jinja", "renders the model's own template"), ("--lora", "takes a LoRA")),
    "llama-server": (("--jinja", "renders the model's own template"), ("--lora", "takes a LoRA")),
    "quantize": (("--allow-requantize", "llama-quantize under its old name"),),
}


@dataclass(frozen=True)
class NativeTool:
    """A program that was found and asked.

    Attributes:
        answers: whether it printed a help text in time.
        build: llama.cpp's build number and commit, such as `8929 (9d34231)`; empty where it does not say.
        skills: what its flags show that it can, in words.
        flags: all long flags of its help.
    """

    name: str
    path: Path
    answers: bool
    build: str
    skills: tuple[str, ...]
    flags: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "path": str(self.path),
            "answers": self.answers,
            "build": self.build,
            "skills": list(self.skills),
            "flags": list(self.flags),
        }

    def words(self) -> str:
        """One line for people."""
        if not self.answers:
            return f"{self.path}: it does not answer --help"
        build = f", build {self.build}" if self.build else ""
        return f"{self.path}{build}: {', '.join(self.skills) or 'none of the flags that matter here'}"


def find_native_tools(names: Iterable[str] = tuple(_SKILLS)) -> list[NativeTool]:
    """Those of the programs that are on PATH, each asked once."""
    found = [(name, find_program(name)) for name in names]
    return [probe_tool(name, path) for name, path in found if path is not None]


def probe_tool(name: str, path: Path) -> NativeTool:
    """Ask one program for its flags and its build."""
    said = read_help(path)
    flags = tuple(sorted(set(_LONG_FLAG.findall(said))))
    match = _VERSION.search(read_output([str(path), "--version"], _VERSION_TIMEOUT_SECONDS)[1]) if flags else None
    return NativeTool(
        name=name,
        path=path,
        answers=bool(flags),
        build=f"{match[1]} ({match[2]})" if match else "",
        skills=tuple(words for flag, words in _SKILLS.get(name, ()) if has_flag(said, flag)),
        flags=flags,
    )
