"""`python -m ollama_forge` is the same tool as `ollama-forge`."""

import sys

from ollama_forge.cli import main

if __name__ == "__main__":
    sys.exit(main())
