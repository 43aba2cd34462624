"""What a job has just cost the model that it made: the result beside its source, and the scores in the registry.

In: what was quantized or merged, and into what. Out: a `Measurement`; `quantize --measure` and `merge --measure` end
with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.errors import AdapterError, ForgeError
from ollama_forge.files import Progress, no_progress
from ollama_forge.jobs.measure import Measurement, MeasureRequest, measure
from ollama_forge.jobs.measure_models import MeasuredModel, resolve_measured
from ollama_forge.jobs.merging import MergeInput
from ollama_forge.jobs.resolve import ResolvedModel

if TYPE_CHECKING:
    from ollama_forge.registry.document import Document


def measure_quantized(
    output: Path | str,
    source: str,
    request: MeasureRequest,
    *,
    store_path: Path | None,
    progress: Progress = no_progress,
) -> Measurement:
    """A quantized model beside what it was made from.

    Args:
        output: the file, or the name of the model in Ollama.

    Raises:
        As `measure.measure`.
    """
    this = _file(output) if isinstance(output, Path) else resolve_measured(output, store_path)
    against = resolve_measured(source, store_path)
    return measure(replace(this, adapters=()), replace(against, adapters=()), request, progress=progress)


def measure_merged(
    result: Path | str,
    base: ResolvedModel,
    inputs: Sequence[MergeInput],
    request: MeasureRequest,
    *,
    store_path: Path | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """A merged model beside its base with the adapters on: what storing the merge cost.

    Where only a merge can express an adapter (DoRA, trained norms), the base alone is compared with; a warning says it.

    Args:
        result: the file or folder, or the name of the model in Ollama.

    Raises:
        As `measure.measure`.
    """
    this = _file(result) if isinstance(result, Path) else resolve_measured(result, store_path)
    own = tuple((path, 1.0) for path in base.adapters)
    added = tuple((item.path, item.weight) for item in inputs)
    text = "+".join([base.text, *(str(path) for path, _ in added)])
    try:
        return measure(this, MeasuredModel(text, base, (*own, *added)), request, progress=progress)
    except AdapterError as exc:
        measured = measure(this, MeasuredModel(base.text, base), request, progress=progress)
        said = f"Measured against the base without its adapters, which cannot be run on it: {exc.what}"
        return replace(measured, warnings=(*measured.warnings, said))


def record_scores(digest: str, scores: Mapping[str, float], registry_path: Path | None = None) -> tuple[str, ...]:
    """Put scores beside a model's last landing and its entry; returns warnings, never raises what a registry can raise.

    Args:
        digest: of its manifest, as 64 hexadecimal digits.
    """
    from ollama_forge.registry.registry_file import find_registry, update_registry

    path = find_registry(registry_path)
    try:
        update_registry(path, lambda document: _with_scores(document, f"sha256:{digest}", scores))
    except (ForgeError, OSError, ValueError) as exc:
        what = exc.what if isinstance(exc, ForgeError) else str(exc)
        return (f"The scores are not in the registry {str(path)!r}: {what}",)
    return ()


def _with_scores(document: Document, digest: str, scores: Mapping[str, float]) -> Document:
    changes: dict[str, object] = {}
    landings = document.lineage.get(digest)
    if landings:
        last = landings[-1].model_copy(update={"scores": {**landings[-1].scores, **scores}})
        changes["lineage"] = {**document.lineage, digest: (*landings[:-1], last)}
    known = {
        name: entry.model_copy(update={"scores": {**entry.scores, **scores}})
        for name, entry in document.models.items()
        if entry.identity.manifest_digest == digest
    }
    if known:
        changes["models"] = {**document.models, **known}
    return document.model_copy(update=changes) if changes else document


def _file(path: Path) -> MeasuredModel:
    text = str(path)
    return MeasuredModel(
        text, ResolvedModel(text, folder=path) if path.is_dir() else ResolvedModel(text, gguf_path=path)
    )
