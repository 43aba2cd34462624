"""What a step cost a model: two models on one text, in numbers and in words.

In: two refs and a text, or a file of prompts. Out: a `Measurement`. The numbers are `measure.comparison`'s; which model
stands behind a ref is `measure_models`' business, and what runs it is `measure_run`'s.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.prompt_windows import prompt_windows
from ollama_forge.dataset.windows import DEFAULT_CONTEXT, Window, cut_windows, longest_window, text_ids
from ollama_forge.errors import DatasetError, NotFoundError, TokenizerError, UsageError
from ollama_forge.files import Progress, disk_error, no_progress
from ollama_forge.jobs.measure_models import (
    MeasuredModel,
    OpenModel,
    open_measured,
    resolve_measured,
    validate_comparable,
)
from ollama_forge.jobs.measure_run import running_pair, takes_engine
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.measure.comparison import Comparison, Divergence, Top
from ollama_forge.tokenizer.decode import decode_tokens
from ollama_forge.tokenizer.encode import GGUFTokenizer

BUILT_IN = "the text of this package"
PROMPT_CONTEXT = 4096
_SHOWN_BEFORE = 100


@dataclass(frozen=True)
class MeasureRequest:
    """On what two models are compared.

    Attributes:
        text: a UTF-8 file; None (with no `prompts` either): the text of this package.
        prompts: a `.txt` or `.jsonl` file, scored in the chat template.
        context: tokens of a window; None: 512, for prompts 4,096, or the models' own where that is less.
        is_exact: multiply by float32 activations instead of rounding them as llama.cpp does.
        device: `auto`, `cpu` or `cuda`.
        n_worst: places to tell of.
    """

    text: Path | None = None
    prompts: Path | None = None
    context: int | None = None
    is_exact: bool = False
    device: str = "auto"
    n_worst: int = 10


@dataclass(frozen=True)
class Place:
    """One token at which the models differ much, in words.

    Attributes:
        before: the text before it, at most 100 characters.
        token: what the text has there.
        this, against: (text, probability) of the tokens that each model holds likeliest.
    """

    window: int
    position: int
    kl: float
    before: str
    token: str
    this: tuple[tuple[str, float], ...]
    against: tuple[tuple[str, float], ...]

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "window": self.window,
            "position": self.position,
            "kl_divergence": self.kl,
            "before": self.before,
            "token": self.token,
            "this": [{"token": token, "probability": share} for token, share in self.this],
            "against": [{"token": token, "probability": share} for token, share in self.against],
        }


@dataclass(frozen=True, eq=False)
class Measurement:
    """`this` beside `against` on one text.

    Attributes:
        this, against: as typed.
        source: where the text came from.
        context: tokens of a window, at most.
        windows: how many.
        left_out: tokens of a text after its last whole window, or prompts that were too long.
        engine: what ran both models: `llama.cpp`, or `torch` over the packed blocks.
        comparison: the numbers.
        places: where the two differ most, worst first.
    """

    this: str
    against: str
    source: str
    context: int
    windows: int
    left_out: int
    is_exact: bool
    engine: str
    comparison: Comparison
    places: tuple[Place, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def scores(self) -> dict[str, float]:
        """The few numbers that a registry keeps."""
        numbers = self.comparison
        return {
            "perplexity": numbers.perplexity_this.value,
            "perplexity_against": numbers.perplexity_against.value,
            "kl_mean": numbers.kl.mean,
            "kl_p99": numbers.kl.p99,
            "same_top": numbers.same_top.value,
        }

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        numbers = self.comparison
        return {
            "this": self.this,
            "against": self.against,
            "text": self.source,
            "context": self.context,
            "windows": self.windows,
            "tokens": numbers.tokens,
            "left_out": self.left_out,
            "exact": self.is_exact,
            "engine": self.engine,
            "perplexity": {
                "this": numbers.perplexity_this.value,
                "this_error": numbers.perplexity_this.error,
                "against": numbers.perplexity_against.value,
                "against_error": numbers.perplexity_against.error,
                "log_ratio": numbers.log_ratio.value,
                "log_ratio_error": numbers.log_ratio.error,
            },
            "kl_divergence": numbers.kl.document(),
            "same_top": numbers.same_top.value,
            "same_top_error": numbers.same_top.error,
            "probability_change": {"mean": numbers.probability_mean, "rms": numbers.probability_rms},
            "positions": [bucket.document() for bucket in numbers.buckets],
            "worst": [place.document() for place in self.places],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class _Material:
    """Windows and what is said of them."""

    windows: tuple[Window, ...]
    source: str
    context: int
    left_out: int
    size_bytes: int
    warnings: tuple[str, ...] = ()


def measure(
    ref: str | MeasuredModel,
    against: str | MeasuredModel,
    request: MeasureRequest | None = None,
    *,
    store_path: Path | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Compare two models.

    Args:
        ref: the model that is judged; `REF+ADAPTER` is understood.
        against: what it should be like, usually what it was made from.

    Raises:
        MissingExtraError: torch is not installed.
        UsageError: different vocabularies, a text of fewer than two tokens, or a context longer than the models'.
        DatasetError, TemplateError: prompts that cannot be used.
        TrainingError: no language models, or numbers that are not finite.
        As `measure_models` says.
    """
    started = time.monotonic()
    request = request or MeasureRequest()
    is_run_by_engine = takes_engine(request.is_exact, request.device)
    this, other = (resolve_measured(item, store_path) if isinstance(item, str) else item for item in (ref, against))
    with contextlib.ExitStack() as files:
        scratch = files.enter_context(scratch_folder())
        first, second = (files.enter_context(open_measured(item, scratch, progress)) for item in (this, other))
        validate_comparable(first, second)
        chat_format = _chat_format(first, second)
        material = _material(request, chat_format, first, second)
        comparison = _compare(first, second, material, request, progress)
    return Measurement(
        this=first.text,
        against=second.text,
        source=material.source,
        context=material.context,
        windows=len(material.windows),
        left_out=material.left_out,
        is_exact=request.is_exact,
        engine="llama.cpp" if is_run_by_engine else "torch",
        comparison=comparison,
        places=tuple(_place(chat_format.tokenizer, found) for found in comparison.worst),
        seconds=time.monotonic() - started,
        warnings=material.warnings,
    )


def _chat_format(this: OpenModel, against: OpenModel) -> ChatFormat:
    """How the judged model reads a conversation; its source's template where it has none."""
    try:
        found = chat_format_of(this.gguf.metadata)
        return found if found.template is not None else chat_format_of(against.gguf.metadata)
    except TokenizerError as exc:
        raise TokenizerError(
            f"{this.text!r} cannot be given a text: {exc.what}", why=exc.why, next="Measure a GGUF with its vocabulary."
        ) from exc


def _material(request: MeasureRequest, chat_format: ChatFormat, this: OpenModel, against: OpenModel) -> _Material:
    if request.text is not None and request.prompts is not None:
        raise UsageError("--text and --prompts do not go together", next="Give one of them.")
    context = _context(request, this, against)
    if request.prompts is not None:
        rendered = prompt_windows(request.prompts, chat_format, context)
        warnings = []
        if rendered.n_too_long:
            warnings.append(f"{rendered.n_too_long:,} prompts are longer than {context:,} tokens and were left out.")
        if 0 < rendered.n_answered < len(rendered.windows):
            warnings.append(f"{rendered.n_answered:,} lines are scored on their answers, the others on their prompts.")
        size = sum(len(window.input_ids) for window in rendered.windows)
        return _Material(rendered.windows, str(request.prompts), context, rendered.n_too_long, size, tuple(warnings))
    text = _read_text(request.text) if request.text else built_in_text()
    ids = text_ids(chat_format.tokenizer, text)
    windows = cut_windows(chat_format.tokenizer, ids, context)
    left_out = len(ids) - sum(len(window.input_ids) for window in windows)
    source = str(request.text) if request.text else BUILT_IN
    return _Material(windows, source, min(context, len(windows[0].input_ids)), left_out, len(text.encode()))


def _context(request: MeasureRequest, this: OpenModel, against: OpenModel) -> int:
    limits = [model.context_length for model in (this, against) if model.context_length is not None]
    longest = min(limits, default=None)
    if request.context is None:
        usual = PROMPT_CONTEXT if request.prompts is not None else DEFAULT_CONTEXT
        return usual if longest is None else min(usual, longest)
    if longest is not None and request.context > longest:
        raise UsageError(
            f"--context {request.context} is more than the models were made for",
            why=f"Their context has {longest:,} tokens.",
            next=f"Use --context {longest}, or less.",
        )
    return request.context


def built_in_text() -> str:
    """A few kilobytes of our own: prose, code, a dialogue, numbers, several languages."""
    return (resources.files("ollama_forge.dataset") / "texts" / "measure.txt").read_text(encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no text {str(path)!r}", next="Check the path.") from exc
    except UnicodeDecodeError as exc:
        raise DatasetError(
            f"{str(path)!r} is not UTF-8 text: {exc.reason} at byte {exc.start}",
            next=f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {path} > text.txt",
        ) from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def _compare(
    this: OpenModel, against: OpenModel, material: _Material, request: MeasureRequest, progress: Progress
) -> Comparison:
    n_tokens = sum(len(window.input_ids) for window in material.windows)
    share = material.size_bytes / max(1, n_tokens)
    longest = longest_window(material.windows)
    with (
        progress("Scoring", material.size_bytes) as advance,
        running_pair(this, against, longest, is_exact=request.is_exact, device=request.device) as models,
    ):
        return models.compare(
            material.windows,
            n_worst=request.n_worst,
            advance=lambda count: advance(int(count * share)),
        )


def _place(tokenizer: GGUFTokenizer, found: Divergence) -> Place:
    def named(top: Top) -> tuple[tuple[str, float], ...]:
        return tuple((decode_tokens(tokenizer, [token_id]), share) for token_id, share in top)

    return Place(
        window=found.window,
        position=found.position,
        kl=found.kl,
        before=decode_tokens(tokenizer, found.before)[-_SHOWN_BEFORE:],
        token=decode_tokens(tokenizer, [found.token_id]),
        this=named(found.top_this),
        against=named(found.top_against),
    )
