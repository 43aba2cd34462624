"""Land one GGUF through the library, without running it: `python bench/land_once.py MODEL.gguf STORE`."""

from __future__ import annotations

import sys
from pathlib import Path

from ollama_forge.store.catalog import open_store
from ollama_forge.store.land import land


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    landed = land(open_store(folder), "bench", model=model)
    print(landed.written_bytes, landed.shared_bytes)


if __name__ == "__main__":
    main()
