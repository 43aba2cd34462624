"""One installed model: its manifest and config, and the texts and paths that its layers stand for.

In: parsed values and the blobs. Out: `InstalledModel`. It only reads; finding models is `catalog`'s.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

from ollama_forge.errors import ForgeError, StoreError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.blobs import BlobStore
from ollama_forge.store.manifest import (
    ADAPTER,
    DRAFT,
    LICENSE,
    MESSAGES,
    MODEL,
    PARAMS,
    PROJECTOR,
    PROMPT,
    SYSTEM,
    TEMPLATE,
    ConfigBlob,
    Layer,
    Manifest,
)
from ollama_forge.store.modelfile import ROLES, Message, Modelfile
from ollama_forge.store.name import ModelName
from ollama_forge.store.parameters import PARAMETERS, ParameterValue, merge_parameters, parse_params_blob
from ollama_forge.store.peek import peek_metadata


@dataclass(frozen=True)
class InstalledModel:
    """A model of a store. Texts are read from their blobs when they are asked for.

    Attributes:
        digest: SHA-256 of the manifest, 64 digits; its first 12 are the ID that `ollama list` shows.
        modified_at: when the manifest was written, UTC.
    """

    name: ModelName
    digest: str
    manifest: Manifest
    config: ConfigBlob
    modified_at: datetime
    blobs: BlobStore = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """What all layers claim together."""
        return self.manifest.size_bytes

    @property
    def family(self) -> str:
        return self.config.model_family

    @property
    def parameter_size(self) -> str:
        """The number of parameters in Ollama's words, such as `7.6B`."""
        return self.config.model_type

    @property
    def quantization(self) -> str:
        return self.config.file_type

    @property
    def model_layer(self) -> Layer | None:
        """The weights; of several the last one counts, as at run time."""
        layers = self.manifest.of_type(MODEL)
        return layers[-1] if layers else None

    @property
    def model_path(self) -> Path | None:
        """The GGUF blob, there or not; None for a model without one (in Ollama's cloud, or MLX)."""
        return self.blobs.path(self.model_layer.digest) if self.model_layer else None

    @property
    def adapters(self) -> tuple[Path, ...]:
        """The LoRA blobs, in the order in which they are applied."""
        return tuple(self.blobs.path(layer.digest) for layer in self.manifest.of_type(ADAPTER))

    @property
    def projector(self) -> Path | None:
        """The vision or audio projector; of several the first one is used."""
        layers = self.manifest.of_type(PROJECTOR)
        return self.blobs.path(layers[0].digest) if layers else None

    @property
    def draft(self) -> Path | None:
        """The draft model for speculative decoding."""
        layers = self.manifest.of_type(DRAFT)
        return self.blobs.path(layers[-1].digest) if layers else None

    @cached_property
    def context_length(self) -> int | None:
        """Trained context in tokens: from the config, else from the GGUF's header; None when neither says."""
        if self.config.context_length:
            return self.config.context_length
        if self.model_path is None:
            return None
        values: Mapping[str, object] = peek_metadata(self.model_path)
        key = f"{values.get('general.architecture', '')}.context_length"
        found = values.get(key)
        if found is None:
            with contextlib.suppress(ForgeError), open_gguf(self.model_path) as gguf:
                found = gguf.arch_value("context_length")
        return found if isinstance(found, int) else None

    @cached_property
    def template(self) -> str | None:
        """The Go template, where the manifest has one."""
        return self._last_text(TEMPLATE, PROMPT)

    @cached_property
    def system(self) -> str | None:
        return self._last_text(SYSTEM)

    @cached_property
    def licenses(self) -> tuple[str, ...]:
        return tuple(self._text(layer) for layer in self.manifest.of_type(LICENSE))

    @cached_property
    def parameters(self) -> tuple[tuple[str, ParameterValue], ...]:
        """The parameters of all params layers, sorted by name; later layers win.

        Raises:
            StoreError: a blob is missing.
            ModelfileError: a value that makes the server refuse the model.
        """
        return merge_parameters(
            *(parse_params_blob(self.blobs.read_bytes(layer.digest)) for layer in self.manifest.of_type(PARAMS))
        )

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that the model starts with.

        Raises:
            StoreError: the blob is missing, or is not a list of messages.
        """
        layers = self.manifest.of_type(MESSAGES)
        if not layers:
            return ()
        try:
            turns = json.loads(self.blobs.read_bytes(layers[-1].digest)) or []
            return tuple(Message(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in turns)
        except (ValueError, AttributeError, TypeError, RecursionError) as exc:
            raise StoreError(
                f"The messages of {self.name.display!r} are not a list of messages",
                why=f"Blob {layers[-1].digest}: {exc}",
                next="Run `ollama-forge verify`.",
            ) from exc

    def modelfile(self, source: str | None = None) -> Modelfile:
        """The Modelfile that makes this model again; FROM is the blob's path unless `source` names something else."""
        return Modelfile(
            sources=(source or str(self.model_path or self.name.display),),
            adapters=tuple(str(path) for path in self.adapters),
            drafts=(str(self.draft),) if self.draft else (),
            template=self.template,
            system=self.system,
            licenses=self.licenses,
            parameters=tuple((name, value) for name, value in self.parameters if name in PARAMETERS),
            messages=tuple(turn for turn in self.messages if turn.role in ROLES),
            renderer=self.config.renderer or None,
            parser=self.config.parser or None,
            requires=self.config.requires or None,
        )

    def _last_text(self, *media_types: str) -> str | None:
        layers = self.manifest.of_type(*media_types)
        return self._text(layers[-1]) if layers else None

    def _text(self, layer: Layer) -> str:
        return self.blobs.read_bytes(layer.digest).decode("utf-8", "replace")
