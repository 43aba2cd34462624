"""Write tests/goldens/imatrix: what `llama-imatrix` makes of each small model and the text there, as short text.

    python scripts/make_imatrix_goldens.py --llama-imatrix build/bin/llama-imatrix --release b11549

Run it when llama.cpp changes what it gathers, and read the difference. The project needs neither this script nor
llama.cpp.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import imatrix_sources as sources  # noqa: E402

from ollama_forge.gguf.imatrix import read_imatrix  # noqa: E402


def write_golden(program: Path, release: str, name: str, folder: Path) -> None:
    model = sources.write_source(folder / "model.gguf", name)
    shutil.copyfile(sources.TEXT, folder / sources.TEXT.name)
    flags = ["-c", str(sources.CONTEXTS[name]), "-t", "2", "--no-ppl", "-ngl", "0"]
    if not name.endswith("bf16"):
        # the cache in float32 as well, so that float rounding is all that is left
        flags += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    argv = [str(program), "-m", model.name, "-f", sources.TEXT.name, "-o", "imatrix.gguf", *flags]
    subprocess.run(argv, cwd=folder, check=True, capture_output=True)
    header = [
        "# Written by scripts/make_imatrix_goldens.py; do not edit.",
        f"# llama.cpp {release}: llama-imatrix {' '.join(argv[1:])}",
        "# name, row, count, total of the sums, and every so manyth of them",
    ]
    lines = header + sources.describe(read_imatrix(folder / "imatrix.gguf"))
    (sources.GOLDENS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(name, len(lines), "lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-imatrix", type=Path, required=True, help="the program of a native llama.cpp build")
    parser.add_argument("--release", required=True, help="its release, for the goldens' header: b11549")
    parser.add_argument("--only", nargs="*", default=list(sources.SOURCES), help="names of sources")
    arguments = parser.parse_args()
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            write_golden(arguments.llama_imatrix.resolve(), arguments.release, name, Path(folder))


if __name__ == "__main__":
    main()
