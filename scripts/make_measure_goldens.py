"""Write tests/goldens/measure: what `llama-perplexity --kl-divergence` says of the demo's model in each quantization.

    python scripts/make_measure_goldens.py --llama-perplexity build/bin/llama-perplexity --release b11549

The tool runs as it does by default, one window at a time. The project needs neither this script nor llama.cpp.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import measure_sources as sources  # noqa: E402

FLAGS = ["-c", str(sources.CONTEXT), "-b", str(sources.CONTEXT), "-t", "1"]
LINES = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+) ±",
    "kl_mean": r"Mean\s+KLD:\s*(-?[\d.]+) ±",
    "kl_error": r"Mean\s+KLD:\s*-?[\d.]+ ±\s*([\d.]+)",
    "kl_max": r"Maximum KLD:\s*([\d.]+)",
    "kl_p99": r"99\.0%\s+KLD:\s*([\d.]+)",
    "kl_median": r"Median\s+KLD:\s*(-?[\d.]+)",
    "same_top": r"Same top p:\s*([\d.]+) ±",
}


BASE_LINES = {"perplexity": r"Final estimate: PPL = ([\d.]+) \+/-"}
"""The base's own pass. Beside a quantized model the tool shows another number for it, from probabilities that were cut
at 16 nats below the largest."""


def run(program: Path, folder: Path, *arguments: str) -> str:
    """Run it in `folder`; gives what it printed."""
    done = subprocess.run([str(program), *arguments, *FLAGS], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(arguments)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def golden_line(name: str, patterns: dict[str, str], program: Path, folder: Path, *arguments: str) -> str:
    """`TYPE name=value ...` from the tool's tables, which it sometimes ends without having written them whole."""
    for _ in range(5):
        output = run(program, folder, *arguments)
        found = {key: re.search(pattern, output) for key, pattern in patterns.items()}
        if all(found.values()):
            return " ".join([name, *(f"{key}={match[1]}" for key, match in found.items() if match)])
    raise SystemExit(f"no {[key for key, match in found.items() if not match]} in:\n{output[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-perplexity", type=Path, required=True)
    parser.add_argument("--release", required=True, help="of llama.cpp, such as b11549")
    options = parser.parse_args()
    program = options.llama_perplexity.resolve()
    lines = [
        "# Written by scripts/make_measure_goldens.py; do not edit.",
        f"# llama.cpp {options.release}: llama-perplexity -m base.gguf -f text.txt --kl-divergence-base base.kld "
        + " ".join(FLAGS),
        "# llama-perplexity -m TYPE.gguf --kl-divergence-base base.kld --kl-divergence " + " ".join(FLAGS),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text(sources.golden_text(), encoding="utf-8")
        sources.write_base(folder)
        arguments = ["-m", "base.gguf", "-f", "text.txt", "--kl-divergence-base", "base.kld"]
        lines.append(golden_line("base", BASE_LINES, program, folder, *arguments))
        for type_name in sources.TYPES:
            path = sources.write_quantized(folder, type_name)
            arguments = ["-m", path.name, "--kl-divergence-base", "base.kld", "--kl-divergence"]
            lines.append(golden_line(type_name, LINES, program, folder, *arguments))
            print(lines[-1])
    sources.GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
