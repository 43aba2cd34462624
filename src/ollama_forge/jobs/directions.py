"""The directions of a model as a whole job: prompts in, a file of directions and the evidence for them out.

In: a model on this disk and two lists of prompts. Out: `ComputedDirections`. What is typed is checked before torch is
loaded; the two lists are tried on the model first, because exchanged they would give the opposite.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.convert.plan import plan_conversion
from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.refusal_markers import read_markers
from ollama_forge.dataset.render import render_prompt
from ollama_forge.dataset.verdicts import Kind, Tally, count_verdicts, judge_answer
from ollama_forge.errors import AdapterError, DatasetError, TemplateError, UsageError
from ollama_forge.files import Progress, no_progress, refuse_existing, require_free_space, write_bytes
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import FileType
from ollama_forge.jobs.ablation_bench import require_not_swapped
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.measure_models import require_packages
from ollama_forge.jobs.refusal_answers import ask_prompts
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.run import opening_turns
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.train.direction_options import DirectionOptions
from ollama_forge.transform.directions import write_directions

if TYPE_CHECKING:
    from ollama_forge.train.directions import DirectionReport

TRIED_PROMPTS = 6
TRIED_TOKENS = 24
_RUNNING_BYTES = 700 << 20  # torch itself, one batch's activations, the pieces that are dequantized


@dataclass(frozen=True)
class ComputeOptions:
    """What is computed, from how many prompts.

    Attributes:
        n_instructions: of each list, drawn with `seed`; all where there are fewer.
        layer_fracs: depths among which the layer is chosen, as shares of all layers; empty: the first 80 %.
        try_prompts: ask the model a few of both lists first.
        load_in_8bit: a Hugging Face folder is read as Q8_0, in half the memory of 16 bits.
        device: `auto`, `cpu` or `cuda`.
    """

    directions: DirectionOptions = field(default_factory=DirectionOptions)
    n_instructions: int = 128
    layer_fracs: tuple[float, ...] = ()
    seed: int = 0
    try_prompts: bool = True
    load_in_8bit: bool = False
    device: str = "auto"


@dataclass(frozen=True, eq=False)
class ComputedDirections:
    """A finished computation.

    Attributes:
        output: the file of directions; `picture` beside it.
    """

    output: Path
    picture: Path
    report: DirectionReport
    seconds: float
    warnings: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        report = self.report
        return {
            "output": str(self.output),
            "picture": str(self.picture),
            "best_layer": report.directions.best_layer,
            "position": report.position,
            "n_directions": report.directions.n_directions,
            "per_layer": report.directions.per_layer,
            "harmful_prompts": report.n_harmful,
            "harmless_prompts": report.n_harmless,
            "tokens": report.n_tokens,
            "layers": [layer.document() for layer in report.layers],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class DirectionPlan:
    """What `compute_direction` would do.

    Attributes:
        longest: tokens of the longest prompt.
        scratch_bytes: of the 16-bit (or Q8_0) GGUF that a Hugging Face folder is read through; 0 for a GGUF.
        memory_bytes: about what it will take: the packed weights as they are read, and the states that are kept.
    """

    output: Path
    harmful: int
    harmless: int
    tokens: int
    longest: int
    scratch_bytes: int
    memory_bytes: int

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output),
            "harmful_prompts": self.harmful,
            "harmless_prompts": self.harmless,
            "tokens": self.tokens,
            "longest": self.longest,
            "scratch_bytes": self.scratch_bytes,
            "memory_bytes": self.memory_bytes,
            "dry_run": True,
        }


def plan_directions(
    model: ResolvedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    output: Path,
    options: ComputeOptions | None = None,
    *,
    overwrite: bool = False,
) -> DirectionPlan:
    """Check all that can be checked without running the model; nothing is written.

    Raises:
        As `compute_direction`, but that the lists look exchanged.
    """
    options = options or ComputeOptions()
    chosen = _checked(model, harmful, harmless, output, options, overwrite)
    with contextlib.ExitStack() as stack:
        if model.folder is not None:
            conversion = stack.enter_context(plan_conversion(model.folder, _conversion(options)))
            metadata: Mapping[str, Any] = {field.key: field.value for field in conversion.fields}
            size_bytes = scratch_bytes = conversion.size_bytes
            require_free_space(Path(tempfile.gettempdir()), scratch_bytes, "the converted model")
        else:
            assert model.gguf_path is not None
            gguf = stack.enter_context(open_gguf(model.gguf_path))
            find_family_by_gguf(gguf.architecture)
            metadata, size_bytes, scratch_bytes = gguf.metadata, gguf.size_bytes, 0
        rows = [_tokenized(model, metadata, prompts) for prompts in chosen]
        architecture = metadata.get("general.architecture")
        n_layers, width = (metadata.get(f"{architecture}.{key}") for key in ("block_count", "embedding_length"))
    per_prompt = 4 * n_layers * width if isinstance(n_layers, int) and isinstance(width, int) else 0
    n_prompts = len(rows[0]) + len(rows[1])
    lengths = [len(row) for part in rows for row in part]
    memory_bytes = packed_memory_bytes(size_bytes) + per_prompt * n_prompts * len(options.directions.positions)
    return DirectionPlan(output, len(rows[0]), len(rows[1]), sum(lengths), max(lengths), scratch_bytes, memory_bytes)


def packed_memory_bytes(model_bytes: int) -> int:
    """About what a packed model of that size takes while prompts run through it."""
    return model_bytes + _RUNNING_BYTES


def _checked(
    model: ResolvedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    output: Path,
    options: ComputeOptions,
    overwrite: bool,
) -> list[list[str]]:
    """The prompts that are drawn from both lists, once nothing speaks against them."""
    options.directions.validate()
    layers_at(options.layer_fracs, 1)
    require_packages()
    for path in (output, output.with_suffix(".png")):
        refuse_existing(path, overwrite=overwrite)
    _require_plain(model)
    _require_disjoint(harmful, harmless)
    return [_draw(prompts, options.n_instructions, options.seed) for prompts in (harmful, harmless)]


def compute_direction(
    model: ResolvedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    output: Path,
    options: ComputeOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ComputedDirections:
    """Compute, and write the file and its picture.

    Raises:
        TemplateError: the model has no chat template.
        DatasetError: a prompt is longer than the context; or the two lists look exchanged.
        UsageError: options that mean nothing, or the lists have prompts in common.
        UnsupportedError: a family without rows.
        MissingExtraError: torch is not installed.
        ExistsError: the output is there and `overwrite` is false.
    """
    started = time.monotonic()
    options = options or ComputeOptions()
    chosen = _checked(model, harmful, harmless, output, options, overwrite)
    picture = output.with_suffix(".png")
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_as_gguf(model, options, progress))
        assert model.gguf_path is not None
        gguf = stack.enter_context(open_gguf(model.gguf_path))
        find_family_by_gguf(gguf.architecture)
        rows = [_tokenized(model, gguf.metadata, prompts) for prompts in chosen]
        warnings = _try_prompts(model, *chosen) if options.try_prompts else ()
        report = _run(gguf, rows, options, progress)
    from ollama_forge.train.direction_plot import draw_evidence

    write_directions(output, report.directions, overwrite=overwrite)
    write_bytes(picture, draw_evidence(report), overwrite=overwrite)
    return ComputedDirections(output, picture, report, time.monotonic() - started, (*warnings, *_doubts(report)))


def layers_at(fractions: Sequence[float], n_layers: int) -> tuple[int, ...]:
    """The layers at some depths: 0.5 of 32 layers is layer 16.

    Raises:
        UsageError: a fraction that is not between 0 and 1.
    """
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise UsageError(
                f"The layer fraction {fraction:g} is not between 0 and 1", next="Example: --layer-fracs 0.4 0.5 0.6"
            )
    return tuple(dict.fromkeys(min(n_layers - 1, int(fraction * n_layers)) for fraction in fractions))


def _run(
    gguf: GGUFFile, rows: Sequence[Sequence[Sequence[int]]], options: ComputeOptions, progress: Progress
) -> DirectionReport:
    from ollama_forge.train.directions import compute_directions
    from ollama_forge.train.scored_model import ScoreOptions, scored_model

    n_tokens = sum(len(row) for part in rows for row in part)
    with scored_model(gguf, options=ScoreOptions(is_exact=True, device=options.device)) as packed:
        n_layers = packed.model.config.get_text_config().num_hidden_layers
        wanted = replace(options.directions, layers=layers_at(options.layer_fracs, n_layers))
        with progress("Reading prompts", n_tokens) as advance:
            return compute_directions(packed, rows[0], rows[1], wanted, advance)


@contextlib.contextmanager
def _as_gguf(model: ResolvedModel, options: ComputeOptions, progress: Progress) -> Iterator[ResolvedModel]:
    """The model with a GGUF; a Hugging Face folder is converted for that long."""
    if model.folder is None:
        yield model
        return
    with scratch_folder() as scratch:
        path = scratch / "model.gguf"
        convert_folder(model.folder, path, _conversion(options), progress=progress)
        yield replace(model, gguf_path=path, folder=None)


def _conversion(options: ComputeOptions) -> ConvertOptions:
    return ConvertOptions(quantize=QuantizeOptions(FileType.MOSTLY_Q8_0) if options.load_in_8bit else None)


def _draw(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    if len(prompts) <= count:
        return list(prompts)
    return random.Random(seed).sample(list(prompts), count)


def _tokenized(model: ResolvedModel, metadata: Mapping[str, Any], prompts: Sequence[str]) -> list[list[int]]:
    _require_template(model, metadata)
    chat_format: ChatFormat = chat_format_of(metadata)
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    before = [{"role": turn.role, "content": turn.content} for turn in opening_turns(model)]
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        ids = render_prompt(chat_format, [*before, {"role": "user", "content": prompt}])
        if isinstance(context, int) and 0 < context < len(ids):
            raise DatasetError(
                f"Prompt {number} has {len(ids):,} tokens, and the context of {model.text!r} has {context:,}: "
                f"{prompt[:60]!r}",
                why="Nothing is cut off a prompt in silence: its last token would be another one.",
                next="Shorten or remove it.",
            )
        rows.append(ids)
    return rows


def _require_plain(model: ResolvedModel) -> None:
    if model.adapters:
        raise AdapterError(
            f"{model.text!r} has {len(model.adapters)} adapter layers",
            why="Directions are those of the weights that are edited, and a layer is not part of them.",
            next=f"Merge them first: ollama-forge merge {model.text} --name NAME",
        )


def _require_template(model: ResolvedModel, metadata: Mapping[str, Any]) -> None:
    if "tokenizer.chat_template" not in metadata:
        raise TemplateError(
            f"{model.text!r} has no chat template",
            why="The direction is that of a chat model about to answer a user's turn; a base model continues text.",
            next="Choose a chat model: ollama-forge list",
        )


def _require_disjoint(harmful: Sequence[str], harmless: Sequence[str]) -> None:
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < 2:
            raise DatasetError(
                f"There {'is' if len(prompts) == 1 else 'are'} {len(prompts)} {name} prompt{'s' * (len(prompts) != 1)}",
                why="A mean over so few says nothing.",
                next="Add prompts, one a line; 100 or more of each are usual.",
            )
    both = set(harmful) & set(harmless)
    if both:
        raise UsageError(
            f"{len(both)} prompts are in both lists, among them {min(both)[:60]!r}",
            why="A prompt is either one that the model refuses, or one that it answers.",
            next="Take them out of one of the files.",
        )


def _try_prompts(model: ResolvedModel, harmful: Sequence[str], harmless: Sequence[str]) -> tuple[str, ...]:
    """Ask a few of both; raises when they look exchanged, warns when nothing is refused."""
    markers = read_markers()

    def tally(prompts: Sequence[str]) -> Tally:
        answers = ask_prompts(model, prompts[:TRIED_PROMPTS], TRIED_TOKENS)
        return count_verdicts(judge_answer(answer.text, markers) for answer in answers)

    refused, answered = tally(harmful), tally(harmless)
    require_not_swapped(refused, answered)
    if not refused.rate(Kind.REFUSED):
        return (
            f"The model refuses none of {refused.n} harmful prompts that were tried: the direction will be that of "
            "something else in which the two lists differ.",
        )
    return ()


def _doubts(report: DirectionReport) -> tuple[str, ...]:
    said = []
    if report.best.silhouette < 0.1:
        said.append(
            f"The two lists are hardly apart, even at layer {report.best.layer} (silhouette "
            f"{report.best.silhouette:.2f}): more prompts, or other ones, would give a better direction."
        )
    if min(report.n_harmful, report.n_harmless) < 32:
        said.append(f"{report.n_harmful} and {report.n_harmless} prompts are few; 100 or more of each are usual.")
    return tuple(said)
