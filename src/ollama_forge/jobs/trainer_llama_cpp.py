"""llama.cpp's two fine-tuning programs: the one of 2023-2024 that trains a LoRA, and today's that trains all weights.

In: paths and a request. Out: command lines. Which program is there is told from its own --help, never from its name.
Facts: examples/finetune (removed in July 2024) writes `--lora-out` in its own format (ggla) and knows Llama only;
examples/training trains float32 GGUF files on plain text, needs `-c`, `-b` and `-ub` to be equal, and writes a GGUF.
https://github.com/ggml-org/llama.cpp/blob/199d28fa6b11f4aba249caffaa0ba385169f7352/examples/training/finetune.cpp
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ollama_forge.dataset.prepare import PreparedFile
from ollama_forge.errors import ExistsError, NotFoundError, UsageError
from ollama_forge.files import Progress, make_folder
from ollama_forge.gguf.native import usable_cores
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, GGMLType, file_type_name, parse_file_type
from ollama_forge.jobs.conversion import convert_folder, convert_options, quantize_file
from ollama_forge.jobs.external_program import find_program, has_flag, read_help
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.trainer_job import BASE_FILE, TrainerJob
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.train.options import plan_steps, settle

SAMPLE_START = "### Instruction"
PROGRAMS = ("finetune", "llama-finetune")
LORA_NAME = "lora.bin"
CHECKPOINT = "checkpoint-{}.gguf"
_CONTEXT_STEP = 32
_WINDOWS = 3


class Kind(Enum):
    """What a program trains."""

    LORA = "a LoRA"
    FULL = "all weights"


@dataclass(frozen=True)
class FinetuneProgram:
    """A program that was found and asked."""

    path: Path
    kind: Kind
    help: str


def find_finetune(kind: Kind | None = None) -> FinetuneProgram | None:
    """The first program on PATH that really does it; one that trains a LoRA is preferred."""
    found = []
    for name in PROGRAMS:
        path = find_program(name)
        if path is None:
            continue
        said = read_help(path)
        if has_flag(said, "--lora-out") and has_flag(said, "--train-data"):
            found.append(FinetuneProgram(path, Kind.LORA, said))
        elif has_flag(said, "--learning-rate") and has_flag(said, "--file") and has_flag(said, "--epochs"):
            found.append(FinetuneProgram(path, Kind.FULL, said))
    wanted = [program for program in found if kind in (None, program.kind)]
    return min(wanted, key=lambda program: program.kind is Kind.FULL, default=None)


def require_finetune() -> FinetuneProgram:
    """Raises:
    NotFoundError: neither program is on PATH.
    """
    program = find_finetune()
    if program is None:
        raise NotFoundError(
            "llama.cpp's finetune is not on PATH",
            why="Looked for `finetune` and `llama-finetune` whose --help shows --lora-out, or today's program for all "
            "weights.",
            next="Train without it: leave out --trainer and --run-trainer; the built-in trainer needs nothing else.",
        )
    return program


def lora_command(
    program: FinetuneProgram, request: FinetuneRequest, prepared: Path, base: Path, lora_out: Path, n_samples: int
) -> tuple[str, ...]:
    """The command line of the program that trains a LoRA; beyond the four paths only what its --help names."""
    loop = settle(request.loop, n_samples)
    wanted: list[tuple[str, object]] = [
        ("--lora-r", request.lora.rank),
        ("--lora-alpha", max(1, round(request.lora.scaled_alpha))),
        ("--adam-alpha", f"{loop.learning_rate:g}"),
        ("--adam-iter", plan_steps(n_samples, loop)),
        ("--epochs", math.ceil(loop.epochs)),
        ("--ctx", request.max_length),
        ("--batch", loop.batch_size),
        ("--grad-acc", loop.grad_accum),
        ("--seed", loop.seed),
        ("--threads", usable_cores()),  # its own 6 wait for each other where there are fewer
        ("--checkpoint-out", request.folder / CHECKPOINT.format("ITERATION")),
    ]
    if request.resume:
        wanted.append(("--checkpoint-in", request.folder / CHECKPOINT.format("LATEST")))
    words = ["--train-data", prepared, "--sample-start", SAMPLE_START, "--model-base", base, "--lora-out", lora_out]
    for flag, value in wanted:
        if has_flag(program.help, flag):
            words += [flag, value]
    return (str(program.path), *map(str, words))


def full_command(
    program: FinetuneProgram, request: FinetuneRequest, prepared: Path, base: Path, output: Path
) -> tuple[str, ...]:
    """The command line of the program that trains all weights of a float32 GGUF."""
    context = str(fitting_context(prepared, base, request.max_length))
    words = ["--file", str(prepared), "--model", str(base), "--output", str(output)]
    words += ["-c", context, "-b", context, "-ub", context]
    words += ["--epochs", str(math.ceil(request.loop.epochs)), "--learning-rate", f"{request.loop.learning_rate:g}"]
    if has_flag(program.help, "--val-split"):
        words += ["--val-split", f"{request.validation_share:g}"]
    if request.loop.seed and has_flag(program.help, "--seed"):
        words += ["--seed", str(request.loop.seed)]
    return (str(program.path), *words)


def fitting_context(prepared: Path, base: Path, longest: int) -> int:
    """A context of at most `longest` tokens that the text fills three times: the program slides a window of that size
    over the text by halves, and a text that is hardly longer than one gives no example at all.

    Raises:
        UsageError: the text is too short for any.
    """
    with open_gguf(base) as gguf:
        tokenizer = build_tokenizer(gguf.metadata)
    with prepared.open("rb") as stream:
        text = stream.read(longest * 64).decode("utf-8", "ignore")
    n_tokens = len(tokenizer.encode(text, parse_special=False))
    context = min(longest, n_tokens // _WINDOWS // _CONTEXT_STEP * _CONTEXT_STEP)
    if context < _CONTEXT_STEP:
        raise UsageError(
            f"The data has {n_tokens} tokens, too few for llama.cpp's finetune",
            why=f"It needs at least {_WINDOWS * _CONTEXT_STEP}.",
            next="Add examples, or use the built-in trainer: --trainer builtin",
        )
    return context


def float32_base(model: ResolvedModel, folder: Path, progress: Progress) -> Path:
    """The model as a float32 GGUF: itself where it is one, else a file in `folder`, made once."""
    source = model.gguf_path
    if source is not None and is_float32(source):
        return source.absolute()
    output = folder / BASE_FILE
    if output.exists():
        return output
    make_folder(folder)
    if source is None:
        assert model.folder is not None
        convert_folder(model.folder, output, convert_options("f32", None), progress=progress)
    else:
        quantize_file(source, output, QuantizeOptions(FileType.ALL_F32, allow_requantize=True), progress=progress)
    return output


def is_float32(path: Path) -> bool:
    """Whether every tensor of a GGUF is float32."""
    with open_gguf(path) as gguf:
        return all(tensor.type == GGMLType.F32 for tensor in gguf.tensors.values())


def plan_llama_cpp(
    program: FinetuneProgram,
    request: FinetuneRequest,
    prepared: PreparedFile,
    source: ResolvedModel,
    target: ResolvedModel,
    adapter_dir: Path,
    options: LandOptions,
) -> TrainerJob:
    """The run of whichever program there is.

    Args:
        source: what is trained on.
        target: what the result is landed on.
        adapter_dir: for a LoRA; all weights go into the working folder.

    Raises:
        ExistsError: an adapter is there already.
    """
    if program.kind is Kind.LORA:
        assert source.gguf_path is not None
        result = adapter_dir / LORA_NAME
        if result.exists() and not (options.overwrite or request.resume):
            raise ExistsError(
                f"There is an adapter already: {str(result)!r}",
                why="It may have taken hours to train.",
                next="Add --force to replace it, or choose another --adapter-output.",
            )
        partial = result.with_name(result.name + ".partial")
        command = lora_command(
            program, request, prepared.path, source.gguf_path.absolute(), partial, prepared.n_samples
        )
        return TrainerJob("llama.cpp", command, program.path, prepared, (prepared.path,), result, partial)
    base = float32_base(source, request.folder, options.progress)
    result = request.folder / "finetuned-f32.gguf"
    partial = result.with_name(result.name + ".partial")
    command = full_command(program, request, prepared.path, base, partial)
    made = (base,) if base.is_relative_to(request.folder) else ()
    file_type = landing_type(target)
    said = f"This finetune trains all weights, not an adapter; the result is landed in {file_type or 'F32'}."
    return TrainerJob(
        "llama.cpp", command, program.path, prepared, (prepared.path, *made), result, partial, True, file_type, (said,)
    )


def landing_type(model: ResolvedModel) -> str:
    """The quantization of a model as a word that `quantize` takes; empty where it is float32 or has no name."""
    assert model.gguf_path is not None
    with open_gguf(model.gguf_path) as gguf:
        number = gguf.metadata.get("general.file_type")
    name = file_type_name(number) if isinstance(number, int) else ""
    try:
        return "" if parse_file_type(name) is FileType.ALL_F32 else name
    except UsageError:
        return ""
