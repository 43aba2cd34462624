"""What `abliterate run` and `abliterate optimize` share: options, the request that they make, how results are shown."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.ablation_options import ablation_options
from ollama_forge.cli.console import Console
from ollama_forge.cli.options import Command
from ollama_forge.cli.prompt_options import PromptPaths
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.abliteration_run import Choice
    from ollama_forge.jobs.abliteration_work import AbliterateRequest
    from ollama_forge.store.modelfile import Modelfile
    from ollama_forge.transform.ablation import AblationOptions


@dataclass(frozen=True)
class JobSettings:
    """What was typed, beside the model, its name and the prompts.

    Attributes:
        ablation: what is not chosen by evidence.
        fractions: depths among which the layer is chosen.
    """

    ablation: AblationOptions
    folder: Path | None
    directions: Path | None
    fractions: tuple[str, ...]
    n_instructions: int
    method: str
    positions: tuple[int, ...]
    n_trial_prompts: int
    trial_tokens: int
    max_tokens: int
    markers: Path | None
    quant: str | None
    no_requantize: bool
    imatrix: Path | None
    device: str
    seed: int
    accept: bool


def job_options(function: Command) -> Command:
    """All of them; the command receives `job`, a `JobSettings`."""
    file = click.Path(path_type=Path)
    declared = [
        click.option("--output-dir", "--workdir", "folder", type=file, help="Stages are kept here (abliterate-NAME)."),
        click.option("--directions", "--refusal-pt", "directions", type=file, help="Directions that are there."),
        click.option("--layer-fracs", "fractions", multiple=True, metavar="F F ...", help="Layers to try, as shares."),
        click.option(
            "--num-instructions", "n_instructions", type=click.IntRange(2), default=128, show_default=True,
            help="Prompts of each list for the directions, at most.",
        ),
        click.option("--method", type=click.Choice(("mean", "median")), default="mean", show_default=True),
        click.option("--position", "positions", multiple=True, type=int, metavar="P", help="Token from the end: -1."),
        click.option("--per-layer-directions", "own_directions", is_flag=True, help="The same as --per-layer."),
        click.option(
            "--num-eval-prompts", "--eval-max-prompts", "n_trial_prompts", type=click.IntRange(2), default=32,
            show_default=True, help="Prompts of each list by which a trial is judged, at most.",
        ),
        click.option(
            "--trial-tokens", type=click.IntRange(4), default=40, show_default=True, help="Of an answer in a trial."
        ),
        click.option(
            "--max-tokens", "--max-new-tokens", "max_tokens", type=click.IntRange(1), default=256, show_default=True,
            help="Of an answer by which the result is judged.",
        ),
        click.option("--markers", "--refusal-markers", "markers", type=file, help="Your own refusal markers."),
        click.option("--quant", metavar="TYPE", help="Type of the result (default: the model's; of a folder Q4_K_M)."),
        click.option("--no-requantize", is_flag=True, help="Keep the types of the model, also of a folder."),
        click.option("--imatrix", type=file, help="Importance matrix for what is quantized again."),
        click.option("--device", type=click.Choice(("auto", "cpu", "cuda", "mps")), default="auto", show_default=True),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn prompts and the search."),
        click.option("--accept", is_flag=True, help="Land it even if it did nothing or broke the model."),
        click.option("--load-in-8bit", is_flag=True, hidden=True),
        click.option("--llama-cpp-dir", hidden=True),
        click.option("--template-from", hidden=True),
    ]  # fmt: skip

    @ablation_options
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        ablation: AblationOptions,
        own_directions: bool,
        load_in_8bit: bool,
        llama_cpp_dir: str | None,
        template_from: str | None,
        **kwargs: Any,
    ) -> Any:
        from dataclasses import fields, replace

        _refuse_old_words(load_in_8bit, llama_cpp_dir, template_from, kwargs["device"])
        if kwargs["no_requantize"] and kwargs["quant"]:
            raise UsageError("--quant and --no-requantize do not go together", next="Leave one of them out.")
        own = {item.name: kwargs.pop(item.name) for item in fields(JobSettings) if item.name != "ablation"}
        wanted = replace(ablation, per_layer=True) if own_directions else ablation
        wanted.validate()
        return function(*args, job=JobSettings(ablation=wanted, **own), **kwargs)

    for option in reversed(declared):
        option(wrapper)
    return wrapper


def _refuse_old_words(load_in_8bit: bool, llama_cpp_dir: str | None, template_from: str | None, device: str) -> None:
    """Options of the predecessors that mean nothing here: what to do instead."""
    if load_in_8bit:
        raise UsageError(
            "--load-in-8bit is not needed",
            why="The model is read packed, as it lies: a Q4_K_M model takes the memory of a Q4_K_M model.",
            next="Leave it out; for a Hugging Face folder, convert it first with --quant Q8_0.",
        )
    if llama_cpp_dir is not None:
        raise UsageError("--llama-cpp-dir is not needed", why="Nothing is compiled or converted by llama.cpp's tools.")
    if template_from is not None:
        raise UsageError(
            "--template-from is not needed",
            why="The chat template and everything else that the model says stays as it is.",
            next="To change it: --template, --system, --param.",
        )
    if device == "mps":
        raise UsageError(
            "--device mps is not known", why="Packed weights run on cpu and cuda.", next="Use --device cpu."
        )


def make_request(
    model: str,
    name: str | None,
    paths: PromptPaths,
    harmful: list[str],
    harmless: list[str],
    job: JobSettings,
    changes: Modelfile,
    *,
    verify: bool,
) -> AbliterateRequest:
    """The library's request for what was typed."""
    from ollama_forge.cli.abliterate_compute_dir import parse_fractions
    from ollama_forge.dataset.prompts import find_prompt_files
    from ollama_forge.jobs.abliteration_work import AbliterateRequest
    from ollama_forge.jobs.directions import ComputeOptions
    from ollama_forge.train.direction_options import DirectionOptions

    directions = DirectionOptions(
        job.method, job.ablation.n_directions or 1, per_layer=bool(job.ablation.per_layer),
        positions=job.positions or (-1,),
    )  # fmt: skip
    directions.validate()
    compute = ComputeOptions(
        directions, job.n_instructions, parse_fractions(None, job.fractions), job.seed, device=job.device
    )
    return AbliterateRequest(
        model=model,
        name=name,
        folder=(job.folder or default_folder(name)).absolute(),
        harmful=tuple(harmful),
        harmless=tuple(harmless),
        prompt_files=find_prompt_files([*paths.harmful, *paths.harmless]),
        directions=job.directions,
        compute=compute,
        ablation=job.ablation,
        n_trial_prompts=job.n_trial_prompts,
        n_prompts=paths.n_prompts,
        quant=job.quant,
        keeps_types=job.no_requantize,
        imatrix=job.imatrix,
        markers=job.markers,
        max_tokens=job.max_tokens,
        trial_tokens=job.trial_tokens,
        device=job.device,
        verify=verify,
        accept=job.accept,
        changes=changes,
    )


def default_folder(name: str | None) -> Path:
    """Where a job works that was not told where."""
    return Path(f"abliterate-{(name or 'run').replace('/', '-').replace(':', '-')}")


def show_layers(console: Console, choice: Choice) -> None:
    """What each layer's direction does when it is taken out everywhere; the chosen one is marked."""
    rows = [
        [
            str(item.layer),
            f"{item.score.tally.refused}/{item.score.tally.n}",
            str(item.score.tally.degenerate),
            f"{item.score.kl:.4f}",
            "chosen" if item.layer == choice.options.layer else "",
        ]
        for item in choice.candidates
    ]
    console.table(["LAYER", "REFUSED", "BROKEN", "KL", ""], rows, right=["LAYER", "REFUSED", "BROKEN", "KL"])
    console.line()


def show_evaluation(console: Console, report: Mapping[str, Any]) -> None:
    """Before and after, from the JSON form of a `RefusalReport`."""
    rows = []
    for side, when in ((report["against"], "before"), (report["this"], "after")):
        for part in ("harmful", "harmless"):
            tally = side.get(part) if side else None
            if tally:
                low, high = tally["refusal_interval"]
                refused = f"{tally['refused']}/{tally['n']} ({low:.0%} to {high:.0%})"
                rows.append([when, part, refused, str(tally["degenerate"]), str(tally["answered"])])
    columns = ["", "PROMPTS", "REFUSED", "BROKEN", "ANSWERED"]
    console.table(columns, rows, right=columns[2:])
    shift = report["shift"]
    if shift:
        console.line(
            f"harmless answers: KL {shift['first_kl']:.4f} at the first token, {shift['answer_kl']:.4f} along "
            f"{shift['tokens']} tokens; same top token {shift['same_top']:.1%}"
        )
        console.line(
            f"perplexity of a text: {shift['text_perplexity_against']:.3f} -> {shift['text_perplexity_this']:.3f}"
        )
