"""Stores and registries for the registry's tests: GGUF headers of a few hundred bytes, and whatever goes wrong."""

from __future__ import annotations

import struct
from pathlib import Path

from tiny_store import DEFAULT_CONFIG, IMAGE, install_model, layer, manifest_path, write_manifest

LLAMA = {"general.architecture": "llama", "general.file_type": 15, "llama.context_length": 512}
JINJA_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


def gguf_header(values: dict[str, str | int | bool], filling: bytes = b"") -> bytes:
    """A GGUF file without tensors; `filling` makes two of them differ."""
    raw = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values))
    for key, value in values.items():
        raw += _text(key)
        if isinstance(value, bool):
            raw += struct.pack("<I?", 7, value)
        elif isinstance(value, int):
            raw += struct.pack("<II", 4, value)
        else:
            raw += struct.pack("<I", 8) + _text(value)
    return raw + b"\0" * (-len(raw) % 32) + filling


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def install(models_dir: Path, name: str, *, file_type: int = 15, filling: bytes = b"", **more: object) -> Path:
    """A model whose header says Q4_K_M unless told otherwise."""
    values = {**LLAMA, "general.file_type": file_type}
    words = {15: "Q4_K_M", 7: "Q8_0", 2: "Q4_0", 1: "F16", 0: "F32"}
    config = {"file_type": words[file_type], "model_type": "8.0B"}
    return install_model(models_dir, name, gguf_header(values, filling), config=config, **more)  # type: ignore[arg-type]


def install_two_hundred(models_dir: Path) -> None:
    """A store like a busy one: shared blobs, namespaces, adapters, projectors, and one oddity of each kind."""
    projector = gguf_header({"general.architecture": "clip", "clip.has_vision_encoder": True})
    for number in range(190):
        name = f"family{number % 38}:{('7b', 'q4_K_M', '8b-instruct-q4_K_M', 'latest', 'iq4_xs-x')[number // 38]}"
        install(models_dir, name, filling=str(number % 60).encode(), system=f"You are {number}.")
    host = "registry.ollama.ai"
    install(models_dir, f"{host}/user/model/7b", adapters=[gguf_header({"general.type": "adapter"})])
    install(models_dir, "hf.co/x/Qwen3-8B-GGUF/Q4_K_M", filling=b"x")
    install(models_dir, "hf.co/y/Qwen3-8B-GGUF/Q4_K_M", filling=b"y")
    install(models_dir, f"{host}/a-b/c/7b", filling=b"1")
    install(models_dir, f"{host}/a/b-c/7b", filling=b"2")
    config = layer(models_dir, "application/vnd.docker.container.image.v1+json", _config())
    seeing = [layer(models_dir, "model", gguf_header(LLAMA, b"sees")), layer(models_dir, "projector", projector)]
    write_manifest(models_dir, "seeing:latest", config, seeing)
    install(models_dir, "wrong:q8_0", filling=b"wrong")
    install(models_dir, "Spelled:latest", filling=b"one")
    install(models_dir, "spelled:latest", filling=b"two")
    missing = {"mediaType": IMAGE + "model", "digest": "sha256:" + "0" * 64, "size": 5}
    write_manifest(models_dir, "missing:latest", config, [missing])
    corrupt = manifest_path(models_dir, "corrupt:latest")
    corrupt.parent.mkdir(parents=True)
    corrupt.write_text("{")


def _config() -> bytes:
    import json

    return json.dumps({**DEFAULT_CONFIG, "file_type": "Q4_K_M"}).encode()
