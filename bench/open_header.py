"""Open one GGUF and print the seconds that it took, imports aside: `open_header.py ours|gguf-py MODEL.gguf`."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main() -> None:
    which, path = sys.argv[1], Path(sys.argv[2])
    if which == "ours":
        from ollama_forge.gguf.reader import open_gguf as opener
    else:
        from gguf import GGUFReader as opener
    began = time.perf_counter()
    opener(path)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
