"""The stages of an abliteration, each kept in a working folder: the model as GGUF, its directions, the edited model.

In: an `AbliterateRequest`. Out: files in its folder. A stage is done again only when what it depends on has changed;
killed anywhere, the same command goes on and ends with the same bytes. Judging and landing is `abliteration_result`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.dataset.prompt_parts import PromptParts, divide_prompts
from ollama_forge.dataset.refusal_markers import Markers, read_markers
from ollama_forge.errors import UnsupportedError
from ollama_forge.files import hash_file
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.ablation_bench import TRIAL_TOKENS, AblationBench, BenchRequest, open_bench
from ollama_forge.jobs.abliteration import ApplyOptions, apply_ablation
from ollama_forge.jobs.conversion import (
    ConvertOptions,
    convert_folder,
    quantize_file,
    quantize_options,
)
from ollama_forge.jobs.directions import ComputeOptions, compute_direction
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.refusal_answers import require_template
from ollama_forge.jobs.refusals import OnStep
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.work_stages import WorkFolder, hash_key
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.transform.ablation import AblationOptions
from ollama_forge.transform.directions import Directions, read_directions

FOLDER_QUANT = "Q4_K_M"
DIRECTIONS_FILE = "directions.safetensors"
SOURCE_FILE = "source.gguf"
EDITED_FILE = "edited.gguf"
QUANTIZED_FILE = "quantized.gguf"


@dataclass(frozen=True)
class AbliterateRequest:
    """What is to be done.

    Attributes:
        model: any ref; a Hugging Face folder is converted to 16 bits first.
        name: the Ollama model to make; None lands nothing.
        folder: where the stages are kept.
        harmful, harmless: prompts; each list is divided into parts for computing, choosing and judging.
        prompt_files: where they came from, for the record.
        directions: a file of directions that is there already.
        compute: how they are found otherwise; its number of prompts is that of the part for computing.
        ablation: what is not chosen by evidence.
        n_trial_prompts, n_prompts: at most so many prompts of each list for choosing, and for judging.
        quant: the type of the result; None: that of the model, or Q4_K_M where it is a Hugging Face folder.
        keeps_types: without `quant` a folder stays in its 16 bits, too.
        imatrix: importance matrix for the tensors that are quantized again.
        max_tokens: of the answers by which the result is judged.
        verify: ask the model before and after.
        accept: land also what did nothing, or is broken.
    """

    model: str
    name: str | None
    folder: Path
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    prompt_files: tuple[Path, ...] = ()
    directions: Path | None = None
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    ablation: AblationOptions = field(default_factory=AblationOptions)
    n_trial_prompts: int = 32
    n_prompts: int | None = None
    quant: str | None = None
    keeps_types: bool = False
    imatrix: Path | None = None
    markers: Path | None = None
    max_tokens: int = 256
    trial_tokens: int = TRIAL_TOKENS
    device: str = "auto"
    verify: bool = True
    accept: bool = False
    changes: Modelfile = field(default_factory=Modelfile)


@dataclass(frozen=True)
class EditedModel:
    """A model that is written. `matrices` counts what was edited, by role."""

    path: Path
    sha256: str
    size_bytes: int
    matrices: Mapping[str, int]
    notes: tuple[str, ...]


class AbliterationWork:
    """The stages, in their order; each method gives what its stage made, now or at an earlier time.

    Attributes:
        request: what is to be done.
        options: how it is landed.
        on_step: told of what is going on.
        folder: where the stages are kept.
        markers: of refusals.
        resolved: the model as it was typed.
        harmful, harmless: the divided lists.
        warnings: what a person should know, in the order in which it came up.
    """

    def __init__(self, request: AbliterateRequest, options: LandOptions, job: str, on_step: OnStep | None) -> None:
        self.request = request
        self.options = options
        self.on_step = on_step
        self.folder = WorkFolder(request.folder, job)
        self.markers: Markers = read_markers(request.markers)
        self.harmful: PromptParts = self._divided(request.harmful)
        self.harmless: PromptParts = self._divided(request.harmless)
        self.warnings: list[str] = []
        if self.harmful.is_shared or self.harmless.is_shared:
            self.warnings.append(
                "A list is so short that directions, choice and judgement use the same prompts: the result will look "
                "better than it is. Use 100 prompts or more."
            )
        self.resolved = resolve(request.model, options.store_path)
        if self.resolved.adapters:
            raise UnsupportedError(
                f"{request.model!r} has an adapter layer",
                why="The directions would be those of the model without it.",
                next=f"Merge it first: ollama-forge merge {request.model} -o merged.gguf; then --model ./merged.gguf",
            )

    def _divided(self, prompts: tuple[str, ...]) -> PromptParts:
        request = self.request
        return divide_prompts(
            prompts,
            n_choosing=request.n_trial_prompts,
            n_judging=request.n_prompts,
        )

    # --- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> ResolvedModel:
        """The model as a GGUF, converted in the folder where it was one of Hugging Face."""
        model = self.resolved
        if model.folder is not None:
            path = self.request.folder / SOURCE_FILE
            if not self.folder.has("source", self._folder_key, [path]):
                self.tell("converting", 0, 1)
                convert_folder(model.folder, path, ConvertOptions(), overwrite=True, progress=self.options.progress)
                self.folder.note("source", self._folder_key)
            model = replace(model, gguf_path=path, folder=None)
        require_template(model)
        return model

    @cached_property
    def _folder_key(self) -> str:
        assert self.resolved.folder is not None
        files = sorted(path for path in self.resolved.folder.iterdir() if path.is_file())
        return hash_key([(path.name, hash_file(path).sha256) for path in files])

    @cached_property
    def source_key(self) -> str:
        """What stands for the weights and the Modelfile of the model."""
        if self.resolved.folder is not None:
            return self._folder_key
        if self.resolved.installed is not None:
            return self.resolved.installed.digest
        with open_gguf(self.model.gguf_path or Path()) as gguf:
            paths = gguf.paths
        return hash_key([hash_file(path).sha256 for path in paths])

    def tell(self, what: str, done: int, total: int) -> None:
        """Say what is going on to whoever watches."""
        if self.on_step:
            self.on_step(what, done, total)

    # --- directions ---------------------------------------------------------------------------------------------------

    @property
    def directions_path(self) -> Path:
        return self.request.directions or self.request.folder / DIRECTIONS_FILE

    @cached_property
    def directions_key(self) -> str:
        """What stands for the directions."""
        if self.request.directions is not None:
            return hash_key(self.source_key, hash_file(self.request.directions).sha256)
        return hash_key(self.source_key, self.harmful.computing, self.harmless.computing, asdict(self.request.compute))

    @property
    def has_directions(self) -> bool:
        """Whether they are there and belong to what is asked."""
        if self.request.directions is not None:
            return True
        return self.folder.has("compute", self.directions_key, [self.directions_path])

    def directions(self) -> Directions:
        """Find the directions, or read those that are there."""
        if not self.has_directions:
            evidence = self._compute()
            self.folder.note("compute", self.directions_key, {"layers": evidence})
        return read_directions(self.directions_path)

    def evidence(self) -> list[Any]:
        """What speaks for each layer; empty for directions that were brought."""
        return list(self.folder.facts("compute").get("layers", ()))

    def _compute(self) -> list[Any]:
        self.tell("computing directions", 0, 1)
        done = compute_direction(
            self.model,
            self.harmful.computing,
            self.harmless.computing,
            self.directions_path,
            self.request.compute,
            overwrite=True,
            progress=self.options.progress,
        )
        self.warnings += done.warnings
        return [layer.document() for layer in done.report.layers]

    @contextlib.contextmanager
    def bench(self) -> Iterator[AblationBench]:
        """The loaded model on which ablations are tried.

        Raises:
            DatasetError: the files are swapped, or a prompt is too long.
        """
        request = BenchRequest(
            self.harmful.choosing,
            self.harmless.choosing,
            self.markers,
            self.request.trial_tokens,
            self.request.device,
        )
        self.tell("asking the untouched model", 0, 1)
        with open_bench(self.model, self.directions(), request) as bench:
            tally = bench.untouched.tally
            if tally.refused < 0.5 * tally.n:
                self.warnings.append(
                    f"The untouched model refuses only {tally.refused} of {tally.n} harmful prompts within "
                    f"{self.request.trial_tokens} tokens: there is little to take out, or the markers do not know how "
                    "it refuses (--markers)."
                )
            if self.request.ablation.norm_preserving:
                self.warnings.append("Trials are judged without --norm-preserving, and the written model with it.")
            yield bench

    @property
    def bench_key(self) -> str:
        """What stands for the judgement of trials."""
        request = self.request
        return hash_key(
            self.directions_key,
            self.harmful.choosing,
            self.harmless.choosing,
            self.markers.key,
            request.trial_tokens,
        )

    # --- the edited model ---------------------------------------------------------------------------------------------

    def apply(self, options: AblationOptions) -> EditedModel:
        """Write the edited model into the folder; with `quant` also in that type."""
        key = self._edit_key(options)
        edited = self._written("apply", key, EDITED_FILE, lambda path: self._edit(options, path))
        wanted = self.quant
        if wanted is None:
            return edited

        def quantize(path: Path) -> dict[str, Any]:
            choice = quantize_options(wanted, imatrix=self.request.imatrix, allow_requantize=True)
            done = quantize_file(edited.path, path, choice, overwrite=True, progress=self.options.progress)
            return {"sha256": done.sha256, "bytes": done.size_bytes, "notes": list(done.warnings)}

        quantized = self._written("quantize", hash_key(key, wanted), QUANTIZED_FILE, quantize)
        return replace(quantized, matrices=edited.matrices, notes=(*edited.notes, *quantized.notes))

    @property
    def quant(self) -> str | None:
        """The type of the result; None: the types of the model."""
        is_folder = self.resolved.folder is not None and not self.request.keeps_types
        return self.request.quant or (FOLDER_QUANT if is_folder else None)

    def has_edited(self, options: AblationOptions) -> bool:
        """Whether `apply` would find its work done."""
        path = self.request.folder / EDITED_FILE
        return self.folder.has("apply", self._edit_key(options), [path])

    def _edit_key(self, options: AblationOptions) -> str:
        matrix = self.request.imatrix
        return hash_key(self.directions_key, asdict(options), hash_file(matrix).sha256 if matrix else None)

    def _written(self, stage: str, key: str, file_name: str, write: Any) -> EditedModel:
        path = self.request.folder / file_name
        if not self.folder.has(stage, key, [path]):
            self.folder.note(stage, key, write(path))
        facts = self.folder.facts(stage)
        return EditedModel(
            path, facts["sha256"], facts["bytes"], facts.get("matrices", {}), tuple(facts.get("notes", ()))
        )

    def _edit(self, options: AblationOptions, path: Path) -> dict[str, Any]:
        self.directions()
        choice = ApplyOptions(options, imatrix=self.request.imatrix)
        done = apply_ablation(
            self.model, self.directions_path, path, choice,
            overwrite=True, is_hashed=True, progress=self.options.progress,
        )  # fmt: skip
        return {
            "sha256": done.sha256,
            "bytes": done.size_bytes,
            "matrices": dict(done.counts),
            "notes": [*done.notes, *done.warnings],
        }
