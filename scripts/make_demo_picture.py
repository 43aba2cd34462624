"""Write docs/demo.svg: a terminal picture of a real run of `ollama-forge demo`. Run it again when the demo changes.

The run happens in a scratch folder, at a pseudo-terminal, so that the colours are those that a person sees.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

TARGET = Path(__file__).resolve().parent.parent / "docs" / "demo.svg"
WIDTH = 118
LIMIT_BYTES = 100_000
_FORMAT_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def record(folder: Path) -> str:
    """What the demo writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ollama_forge", "demo", "--store", "demo-store"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH), "HOME": str(folder)}
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        said += chunk
    if process.wait() != 0:
        raise SystemExit(f"the demo ended with {process.returncode}:\n{said.decode('utf-8', 'replace')}")
    return said.decode("utf-8").replace("\r\n", "\n")


def last_of_each_line(text: str) -> str:
    """A line that rewrote itself (a progress bar) is shown as it stood at the end."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(line for line in lines if not line.startswith("\x1b[2K"))


def render(text: str) -> str:
    """The picture; it names no font that would have to be fetched."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text("$ ollama-forge demo", style="bold"))
        console.print(Text.from_ansi(text.strip("\n")))
        picture = console.export_svg(title="ollama-forge demo", unique_id="demo")
    return _FORMAT_FONT.sub("", picture).replace("Fira Code", "ui-monospace, Menlo, Consolas")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ollama-forge-picture-") as scratch:
        text = last_of_each_line(record(Path(scratch)).replace(scratch, "."))
    picture = render(text)
    size_bytes = len(picture.encode())
    if size_bytes > LIMIT_BYTES:
        raise SystemExit(f"the picture has {size_bytes} bytes, more than {LIMIT_BYTES}")
    TARGET.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
