"""Real small Ollama stores on disk, written plainly and without the code under test.

In: a folder and what a model shall consist of. Out: blobs and manifests as Ollama's own server leaves them (Go's
field order, a newline at the end), ready to be read, customised, damaged or replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

IMAGE = "application/vnd.ollama.image."
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DEFAULT_CONFIG = {
    "model_format": "gguf",
    "model_family": "llama",
    "model_families": ["llama"],
    "model_type": "41K",
    "file_type": "F32",
    "architecture": "amd64",
    "os": "linux",
}


def write_blob(models_dir: Path, content: bytes) -> tuple[str, int]:
    """Put bytes under their digest; returns the digest as a manifest spells it, and the size."""
    hexadecimal = hashlib.sha256(content).hexdigest()
    path = models_dir / "blobs" / f"sha256-{hexadecimal}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return f"sha256:{hexadecimal}", len(content)


def layer(models_dir: Path, kind: str, content: bytes) -> dict[str, object]:
    """A blob and the manifest's entry for it; `kind` is the last word of its media type, or a whole one."""
    digest, size = write_blob(models_dir, content)
    return {"mediaType": kind if "/" in kind else IMAGE + kind, "digest": digest, "size": size}


def write_manifest(
    models_dir: Path, name: str, config: Mapping[str, object], layers: Sequence[Mapping[str, object]]
) -> Path:
    """`name` is model:tag in the library, or all four parts as host/namespace/model/tag."""
    path = manifest_path(models_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": list(layers)}
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def manifest_path(models_dir: Path, name: str) -> Path:
    parts = name.split("/")
    if len(parts) == 1:
        model, _, tag = name.partition(":")
        parts = ["registry.ollama.ai", "library", model, tag or "latest"]
    return models_dir.joinpath("manifests", *parts)


def install_model(
    models_dir: Path,
    name: str,
    gguf: bytes,
    *,
    template: str = "",
    system: str = "",
    params: Mapping[str, object] | None = None,
    messages: Sequence[Mapping[str, str]] = (),
    licenses: Sequence[str] = (),
    adapters: Sequence[bytes] = (),
    config: Mapping[str, object] | None = None,
) -> Path:
    """A model as `ollama create` leaves it; returns its manifest."""
    layers = [layer(models_dir, "model", gguf)]
    layers += [layer(models_dir, "adapter", content) for content in adapters]
    layers += [layer(models_dir, "template", template.encode())] if template else []
    layers += [layer(models_dir, "system", system.encode())] if system else []
    layers += [layer(models_dir, "license", text.encode()) for text in licenses]
    layers += [layer(models_dir, "params", json.dumps(dict(params)).encode() + b"\n")] if params else []
    layers += [layer(models_dir, "messages", json.dumps(list(messages)).encode() + b"\n")] if messages else []
    document = json.dumps({**DEFAULT_CONFIG, **(config or {})}, separators=(",", ":")) + "\n"
    return write_manifest(models_dir, name, layer(models_dir, CONFIG_TYPE, document.encode()), layers)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder` with what it holds: two equal snapshots mean that nothing was changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if path.is_symlink():
            found[key] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[key] = "folder"
        else:
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
