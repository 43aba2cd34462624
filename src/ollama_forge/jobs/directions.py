"""The directions of a model as a whole job: prompts in, a file of directions and the evidence for them out.

In: a model on this disk and two lists of prompts. Out: `ComputedDirections`. What is typed is checked before torch is
loaded; the two lists are tried on the model first, because exchanged they would give the opposite.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.refusal_markers import read_markers
from ollama_forge.dataset.render import render_prompt
from ollama_forge.dataset.verdicts import Kind, Tally, count_verdicts, judge_answer
from ollama_forge.errors import AdapterError, DatasetError, TemplateError, UsageError
from ollama_forge.files import Progress, no_progress, refuse_existing, write_bytes
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import FileType
from ollama_forge.jobs.ablation_bench import require_not_swapped
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.measure_models import require_packages
from ollama_forge.jobs.refusal_answers import ask_prompts
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.run import opening_turns
from ollama_forge.train.direction_options import DirectionOptions
from ollama_forge.transform.directions import write_directions

if TYPE_CHECKING:
    from ollama_forge.train.directions import DirectionReport

TRIED_PROMPTS = 6
TRIED_TOKENS = 24


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
    options.directions.validate()
    require_packages()
    picture = output.with_suffix(".png")
    for path in (output, picture):
        refuse_existing(path, overwrite=overwrite)
    _require_plain(model)
    _require_disjoint(harmful, harmless)
    chosen = [_draw(prompts, options.n_instructions, options.seed) for prompts in (harmful, harmless)]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_as_gguf(model, options, progress))
        assert model.gguf_path is not None
        gguf = stack.enter_context(open_gguf(model.gguf_path))
        _require_template(model, gguf)
        rows = [_tokenized(model, gguf, prompts) for prompts in chosen]
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
    import tempfile

    from ollama_forge.gguf.quantize import QuantizeOptions

    quantize = QuantizeOptions(FileType.MOSTLY_Q8_0) if options.load_in_8bit else None
    with tempfile.TemporaryDirectory(prefix="ollama-forge-") as scratch:
        path = Path(scratch) / "model.gguf"
        convert_folder(model.folder, path, ConvertOptions(quantize=quantize), progress=progress)
        yield replace(model, gguf_path=path, folder=None)


def _draw(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    if len(prompts) <= count:
        return list(prompts)
    return random.Random(seed).sample(list(prompts), count)


def _tokenized(model: ResolvedModel, gguf: GGUFFile, prompts: Sequence[str]) -> list[list[int]]:
    chat_format: ChatFormat = chat_format_of(gguf.metadata)
    context = gguf.arch_value("context_length")
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


def _require_template(model: ResolvedModel, gguf: GGUFFile) -> None:
    if "tokenizer.chat_template" not in gguf.metadata:
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
