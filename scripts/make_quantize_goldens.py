"""Write tests/goldens/quantize: what `llama-quantize` makes of each small source, as short text.

    python scripts/make_quantize_goldens.py --llama-quantize build/bin/llama-quantize --release b11549

Run it when llama.cpp changes a mix, and read the difference; --types rewrites the lines of some file types only. The
project needs neither this script nor llama.cpp.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import quantize_sources as sources  # noqa: E402

from ollama_forge.gguf.mix_rules import MAIN_TYPES  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens" / "quantize"
REFUSED = "refused: "


def run_quantize(program: Path, folder: Path, word: str, flags: list[str]) -> str | None:
    """Quantize a source to out.gguf in `folder`; the reason when the program refuses."""
    source = "calm.gguf" if word in sources.CALM_FILE_TYPES else "source.gguf"
    argv = [str(program), *flags, source, "out.gguf", word, "2"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "failed to quantize: " in line]
    return lines[0].split("failed to quantize: ")[1] if lines else f"exit {done.returncode}"


def golden_lines(
    program: Path, folder: Path, name: str, flag_sets: dict[str, list[str]], words: list[str]
) -> list[str]:
    lines = []
    for word in words:
        for label, flags in flag_sets.items():
            refusal = run_quantize(program, folder, word, flags)
            main = MAIN_TYPES[sources.file_type(word)]
            text = REFUSED + refusal if refusal else sources.describe(folder / "out.gguf", main)
            lines.append(f"{word} {label} {text}")
    print(name, len(lines), "lines")
    return lines


def write_golden(program: Path, release: str, name: str, folder: Path, types: list[str]) -> None:
    sources.write_source(folder / "source.gguf", name)
    sources.write_source(folder / "calm.gguf", name, calm=True)
    sources.write_source_imatrix(folder / sources.IMATRIX_NAME, name)
    flag_sets = {"plain": [], "imatrix": ["--imatrix", sources.IMATRIX_NAME]}
    header = [
        "# Written by scripts/make_quantize_goldens.py; do not edit.",
        f"# llama.cpp {release}: llama-quantize [--imatrix {sources.IMATRIX_NAME}] source.gguf out.gguf TYPE 2",
    ]
    words = [word for word in sources.SOURCES[name].file_types if word in types]
    lines = golden_lines(program, folder, name, flag_sets, words)
    if name in sources.OPTIONS_SOURCES:
        words = [word for word in sources.OPTION_FILE_TYPES if word in types]
        lines += golden_lines(program, folder, name + " with options", sources.OPTION_SETS, words)
    run_quantize(program, folder, "Q4_K_M", flag_sets["imatrix"])
    keys = [f"key {line}" for line in sources.describe_fields(gguf.GGUFReader(folder / "out.gguf"))]
    target = GOLDENS / f"{name}.txt"
    content = [*header, *merge_lines(target, lines), "# keys of Q4_K_M imatrix", *keys]
    target.write_text("\n".join(content) + "\n", encoding="utf-8")


def merge_lines(target: Path, lines: list[str]) -> list[str]:
    """The golden's old lines with those that were made again in their place."""
    fresh = {tuple(line.split(" ", 2)[:2]): line for line in lines}
    old = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    kept = {tuple(line.split(" ", 2)[:2]): line for line in old if not line.startswith(("#", "key "))}
    return list((kept | fresh).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the program of a native llama.cpp build")
    parser.add_argument("--release", required=True, help="its release, for the goldens' header: b11549")
    parser.add_argument("--only", nargs="*", default=list(sources.SOURCES), help="names of sources")
    parser.add_argument("--types", nargs="*", default=sources.FILE_TYPE_WORDS, help="file types")
    arguments = parser.parse_args()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            program = arguments.llama_quantize.resolve()
            write_golden(program, arguments.release, name, Path(folder), arguments.types)


if __name__ == "__main__":
    main()
