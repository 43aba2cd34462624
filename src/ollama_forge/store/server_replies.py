"""What a running Ollama says, as frozen values. In: the official client's replies. Out: values without pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ollama


@dataclass(frozen=True)
class ServerModel:
    """A model that the server has, as `/api/tags` lists it.

    Attributes:
        digest: of its manifest: 64 hexadecimal digits.
        parameter_size: as Ollama writes it, for example `3.2B`.
    """

    name: str
    digest: str
    size_bytes: int
    modified_at: datetime | None
    family: str
    parameter_size: str
    quantization: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in the server's memory, as `/api/ps` lists it."""

    name: str
    digest: str
    size_bytes: int
    gpu_bytes: int
    context_length: int | None
    expires_at: datetime | None


@dataclass(frozen=True)
class ServerModelDetails:
    """What `/api/show` says of one model.

    Attributes:
        modelfile: its text, with absolute blob paths of the server's machine.
        parameters: name and text, in no order that means anything.
        metadata: GGUF keys; arrays are None.
    """

    modelfile: str
    template: str
    parameters: str
    license: str
    family: str
    parameter_size: str
    quantization: str
    capabilities: tuple[str, ...]
    metadata: Mapping[str, Any]
    modified_at: datetime | None


@dataclass(frozen=True)
class Progress:
    """One line of a long job on the server. The byte counts are 0 where the server tells none."""

    status: str
    digest: str = ""
    total_bytes: int = 0
    done_bytes: int = 0


@dataclass(frozen=True)
class ServerAnswer:
    """What a model on the server said.

    Attributes:
        stop_reason: `stop`, `length`, or what else the server tells (`load`, `unload`).
        seconds: as measured here, loading included.
    """

    text: str
    thinking: str
    stop_reason: str
    prompt_tokens: int
    n_tokens: int
    seconds: float


def server_model(model: ollama.ListResponse.Model) -> ServerModel:
    """One row of `/api/tags`."""
    details = model.details
    return ServerModel(
        name=model.model or "",
        digest=model.digest or "",
        size_bytes=int(model.size or 0),
        modified_at=model.modified_at,
        family=(details.family if details else None) or "",
        parameter_size=(details.parameter_size if details else None) or "",
        quantization=(details.quantization_level if details else None) or "",
    )


def loaded_model(model: ollama.ProcessResponse.Model) -> LoadedModel:
    """One row of `/api/ps`."""
    return LoadedModel(
        name=model.name or model.model or "",
        digest=model.digest or "",
        size_bytes=int(model.size or 0),
        gpu_bytes=int(model.size_vram or 0),
        context_length=model.context_length,
        expires_at=model.expires_at,
    )


def model_details(shown: ollama.ShowResponse) -> ServerModelDetails:
    """The reply of `/api/show`."""
    details = shown.details
    return ServerModelDetails(
        modelfile=shown.modelfile or "",
        template=shown.template or "",
        parameters=shown.parameters or "",
        license=shown.license or "",
        family=(details.family if details else None) or "",
        parameter_size=(details.parameter_size if details else None) or "",
        quantization=(details.quantization_level if details else None) or "",
        capabilities=tuple(shown.capabilities or ()),
        metadata=dict(shown.modelinfo or {}),
        modified_at=shown.modified_at,
    )


def progress(line: Mapping[str, Any]) -> Progress:
    """One line of a streamed job."""
    total, done = line.get("total"), line.get("completed")
    return Progress(
        status=str(line.get("status") or ""),
        digest=str(line.get("digest") or ""),
        total_bytes=total if isinstance(total, int) else 0,
        done_bytes=done if isinstance(done, int) else 0,
    )
