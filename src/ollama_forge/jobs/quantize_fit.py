"""A model made to fit a size: what each part loses in each type is measured, and the mix that loses least is written.

In: a GGUF file, a size and a context. Out: a `Fit`: the mix, what it and the plain mixes cost and weigh, and the file.
The size is that of the weights and of the keys and values of the context; what llama.cpp needs to compute is said in
words. The mix is judged by text that it was not found with; where a plain mix does better, the plain mix is taken.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ollama_forge.arch.families import GGUF_ARCHITECTURES, find_family_by_gguf
from ollama_forge.arch.kv_cache import kv_cache_bytes, trained_context
from ollama_forge.errors import FormatError, UsageError
from ollama_forge.files import Progress, no_progress, refuse_existing
from ollama_forge.gguf.budget import Front, Mix, find_front
from ollama_forge.gguf.fit_groups import PLAIN_MIXES, main_file_type, plan_groups
from ollama_forge.gguf.mixture import QuantizeOptions, TensorRow, allows_quantization, plan_choices
from ollama_forge.gguf.quantize import plan_quantization
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import FileType, GGMLType, file_type_name, tensor_bytes
from ollama_forge.jobs.conversion import ConvertedFile, quantize_file
from ollama_forge.jobs.fit_measurements import FitMeasurements, FitText, cut_fit_text
from ollama_forge.jobs.fit_result import (
    DEFAULT_CONTEXT,
    OWN,
    UNCHANGED,
    Fit,
    FitChoice,
    FitPlan,
    FitPoint,
    FitRequest,
)
from ollama_forge.jobs.lineage import weights_digest
from ollama_forge.jobs.measure_models import require_packages

_CURVE_POINTS = 200


def fit_file(
    source: Path,
    output: Path,
    request: FitRequest,
    options: QuantizeOptions,
    *,
    model_sha256: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda _text: None,
) -> Fit:
    """Find the mix, measure it, write the file.

    Args:
        source: a GGUF; the better its types, the better the result.
        options: importance matrix, threads, `allow_requantize`; types are what is to be found.
        model_sha256: of the source where it is known; otherwise it is computed.

    Raises:
        UsageError: a size below the smallest mix, a context that cannot be, a text that is too short, a source that is
            quantized already without `allow_requantize`.
        UnsupportedError: a family without rows.
        MissingExtraError: torch is not installed, and something has to be measured.
    """
    refuse_existing(output, overwrite=overwrite)
    if output.exists() and output.samefile(source):
        raise FormatError(
            f"{str(output)!r} is the source itself",
            why="A model is never quantized in place: the source would be lost.",
            next="Choose another name for -o.",
        )
    with open_gguf(source) as file:
        search = _Search(file, request, options)
        search.require_possible()
        if search.fits_unchanged:
            return search.keep_unchanged(source, output, overwrite, dry_run, progress)
        return search.find(source, output, model_sha256, overwrite, dry_run, progress, say)


class _Search:
    """One search for a mix: sizes first, then measurements."""

    def __init__(self, file: GGUFFile, request: FitRequest, options: QuantizeOptions) -> None:
        self.started = time.monotonic()
        self.file = file
        self.request = request
        self.options = options
        self.longest = trained_context(file)
        self.context = request.context or min(DEFAULT_CONTEXT, self.longest or DEFAULT_CONTEXT)
        self.kv_bytes = kv_cache_bytes(file, self.context)
        self.room_bytes = request.limit_bytes - self.kv_bytes
        self.rows: list[TensorRow] = [(item.name, item.shape, item.type) for item in file.tensors.values()]
        weighted = options.imatrix.entries if options.imatrix is not None else {}
        unchanged = {name: type for name, _, type in self.rows}
        self.source_bytes = plan_quantization(file, self._own_options(unchanged)).size_bytes
        self.plain = self._plain_mixes()
        self.plan = plan_groups(
            _measurable(file.architecture, self.rows),
            weighted=weighted,
            max_passes=request.max_passes,
            plain=[types for _, _, types in self.plain],
            alignment=file.alignment,
        )
        self.fixed_bytes = self.source_bytes - sum(group.options[-1].size_bytes for group in self.plan.groups)
        self.smallest_bytes = self.fixed_bytes + sum(group.smallest_bytes for group in self.plan.groups)
        self.warnings: list[str] = []
        if self.longest is not None and self.context > self.longest:
            self.warnings.append(
                f"A context of {self.context:,} is more than the {self.longest:,} that the model was trained for."
            )

    @property
    def fits_unchanged(self) -> bool:
        return self.source_bytes <= self.room_bytes

    def require_possible(self) -> None:
        """Refuse a size that no mix meets, with the smallest that one does."""
        if self.smallest_bytes > self.room_bytes:
            needed = self.smallest_bytes + self.kv_bytes
            raise UsageError(
                f"--fit {self.request.limit_bytes:,} bytes is too small: the smallest mix takes {needed:,} bytes",
                why=f"Its weights have {self.smallest_bytes:,} bytes, the keys and values of {self.context:,} tokens "
                f"have {self.kv_bytes:,}.",
                next=f"Use --fit {_rounded_up(needed)}, a smaller --context, or a smaller model.",
            )

    def keep_unchanged(self, source: Path, output: Path, overwrite: bool, dry_run: bool, progress: Progress) -> Fit:
        """The best that fits is the model as it is."""
        self.warnings.append(
            f"The model fits as it is ({self.source_bytes + self.kv_bytes:,} bytes with its context): nothing was "
            "quantized, and nothing had to be measured."
        )
        options = self._own_options({name: type for name, _, type in self.rows})
        written = quantize_file(source, output, options, overwrite=overwrite, dry_run=dry_run, progress=progress)
        return self._result(UNCHANGED, None, written, dry_run=dry_run, kl=0.0)

    def find(
        self,
        source: Path,
        output: Path,
        model_sha256: str,
        overwrite: bool,
        dry_run: bool,
        progress: Progress,
        say: Callable[[str], None],
    ) -> Fit:
        """Measure, choose, prove, write."""
        smallest = Mix(self.plan.groups, (0,) * len(self.plan.groups), 0, 0.0)
        plan_quantization(self.file, self._own_options(self._types_of(smallest)))  # refuses what cannot be quantized
        find_family_by_gguf(self.file.architecture)  # and what cannot be run
        text = cut_fit_text(self.file, self.request.text, self.longest)
        digest = model_sha256 or weights_digest(self.file.path)
        with FitMeasurements(self.file, digest, text, self.options.imatrix, self.request.device, say) as numbers:
            missing = numbers.missing(self.plan)
            plan = self._fit_plan(text, missing, len(self.plain))
            if dry_run and missing:
                return self._result("", None, None, dry_run=True, plan=plan)
            require_packages()
            say(_announce(plan, text))
            with progress(f"Measuring {missing} runs", missing * text.tokens_per_pass) as advance:
                groups = numbers.sensitivities(self.plan, advance)
            front = find_front(groups)
            mix = front.best_within(self.room_bytes - self.fixed_bytes)
            assert mix is not None
            if dry_run:
                return self._result(OWN, mix, None, dry_run=True, plan=plan, front=front)
            chosen, points = self._judge(mix, numbers, progress)
            if text.is_shared:
                self.warnings.append("The text is short: the mix was judged by the text that it was found with.")
            run = numbers.n_run
        options = self._own_options(self._types_of(mix)) if chosen.name == OWN else self._plain_options(chosen.name)
        written = quantize_file(source, output, options, overwrite=overwrite, progress=progress)
        return self._result(
            chosen.name, mix, written, dry_run=False, plan=plan, front=front, points=points, kl=chosen.kl, run=run
        )

    def _judge(
        self,
        mix: Mix,
        numbers: FitMeasurements,
        progress: Progress,
    ) -> tuple[FitPoint, tuple[FitPoint, ...]]:
        """The mix and the plain ones, measured; and which of those that fit is best."""
        rivals = [(OWN, mix.size_bytes + self.fixed_bytes, self._types_of(mix)), *self.plain]
        with progress("Measuring whole mixes", len(rivals)) as advance:
            costs = numbers.judge([types for _, _, types in rivals], advance)
        points = [
            FitPoint(name, size_bytes, kl, size_bytes <= self.room_bytes)
            for (name, size_bytes, _), kl in zip(rivals, costs, strict=True)
        ]
        # of equal ones the found mix, which is named first
        chosen = min((point for point in points if point.fits), key=lambda point: point.kl)
        if chosen.name != OWN:
            self.warnings.append(
                f"The mix that was found costs {points[0].kl:.5f} nats, and {chosen.name}, which fits too, only "
                f"{chosen.kl:.5f}: {chosen.name} was taken."
            )
        return chosen, tuple(sorted(points, key=lambda point: (point.size_bytes, point.name)))

    def _plain_mixes(self) -> list[tuple[str, int, dict[str, GGMLType]]]:
        """(name, file bytes, type of each tensor) of the plain mixes that are smaller than the source."""
        found = []
        for file_type in PLAIN_MIXES:
            options = self._plain_options(file_type_name(file_type))
            choices = plan_choices(self.file.architecture, self.file.metadata.get, self.rows, options)
            size_bytes = self.source_bytes + sum(
                self._padded(choice.type, choice.shape) - self._padded(choice.source, choice.shape)
                for choice in choices
            )
            if size_bytes < self.source_bytes:
                name = file_type_name(file_type)
                found.append((name, size_bytes, {choice.name: choice.type for choice in choices}))
        return found

    def _padded(self, type: GGMLType, shape: Sequence[int]) -> int:
        alignment = self.file.alignment
        return -(-tensor_bytes(type, shape) // alignment) * alignment

    def _plain_options(self, name: str) -> QuantizeOptions:
        file_type = next(item for item in FileType if file_type_name(item) == name)
        return replace(self.options, file_type=file_type, tensor_types=())

    def _own_options(self, types: Mapping[str, GGMLType]) -> QuantizeOptions:
        quantizable = {name for name, shape, _ in self.rows if allows_quantization(name, shape)}
        sizes = {name: tensor_bytes(types[name], shape) for name, shape, _ in self.rows}
        pairs = tuple((f"^{re.escape(name)}$", type) for name, type in types.items() if name in quantizable)
        wanted = {name: types[name] for name in quantizable}
        return replace(self.options, file_type=main_file_type(wanted, sizes), tensor_types=pairs)

    def _types_of(self, mix: Mix) -> dict[str, GGMLType]:
        return {**{name: type for name, _, type in self.rows}, **mix.tensor_types}

    def _fit_plan(self, text: FitText | None, missing: int, n_plain: int) -> FitPlan:
        return FitPlan(
            groups=len(self.plan.groups),
            bands=self.plan.n_bands,
            passes=self.plan.n_passes,
            passes_missing=missing,
            mixes=n_plain + 1,
            tokens_per_pass=text.tokens_per_pass if text else 0,
            smallest_bytes=self.smallest_bytes,
            source_bytes=self.source_bytes,
        )

    def _result(
        self,
        chosen: str,
        mix: Mix | None,
        written: ConvertedFile | None,
        *,
        dry_run: bool,
        plan: FitPlan | None = None,
        front: Front | None = None,
        points: tuple[FitPoint, ...] = (),
        kl: float | None = None,
        run: int = 0,
    ) -> Fit:
        return Fit(
            limit_bytes=self.request.limit_bytes,
            context=self.context,
            kv_bytes=self.kv_bytes,
            plan=plan or self._fit_plan(None, 0, 0),
            chosen=chosen,
            kl=kl,
            predicted_kl=mix.cost if mix else None,
            points=points,
            choices=_choices(mix) if mix else (),
            curve=_thinned(front, self.fixed_bytes) if front else (),
            written=written,
            passes_run=run,
            seconds=time.monotonic() - self.started,
            warnings=tuple(self.warnings),
            is_dry_run=dry_run,
        )


def _measurable(architecture: str, rows: Sequence[TensorRow]) -> list[TensorRow]:
    """The tensors that text runs through. Those of pictures and sound stay as they are: nothing says what they cost."""
    if architecture not in GGUF_ARCHITECTURES:
        return list(rows)
    family = find_family_by_gguf(architecture)
    return [row for row in rows if family.address_by_gguf_name(row[0]) is not None]


def _choices(mix: Mix) -> tuple[FitChoice, ...]:
    return tuple(
        FitChoice(group.name, len(group.tensors), _type_names(option.types), option.size_bytes, option.cost)
        for group, option in zip(mix.groups, mix.options, strict=True)
    )


def _type_names(types: Sequence[GGMLType]) -> str:
    """`Q4_K`, or `Q4_K, Q6_K` where the tensors of a group differ."""
    return ", ".join(sorted({type.name for type in types}))


def _thinned(front: Front, fixed_bytes: int) -> tuple[tuple[int, float], ...]:
    """Some points of the front, as whole files."""
    step = max(1, len(front.sizes) // _CURVE_POINTS)
    picked = [*range(0, len(front.sizes) - 1, step), len(front.sizes) - 1]
    return tuple((int(front.sizes[at]) + fixed_bytes, float(front.costs[at])) for at in picked)


def _announce(plan: FitPlan, text: FitText) -> str:
    if not plan.passes_missing:
        return "What each part costs was measured before; only whole mixes are left."
    return (
        f"{plan.passes_missing} runs of the model over {text.tokens_per_pass:,} tokens find what each of {plan.groups} "
        f"parts costs; then {plan.mixes} whole mixes are measured. Interrupted, the same command goes on where it was."
    )


def _rounded_up(size_bytes: int) -> str:
    """A size to type, not smaller than this one."""
    if size_bytes >= 10**9:
        return f"{math.ceil(size_bytes / 10**7) / 100:g}GB"
    return f"{math.ceil(size_bytes / 10**4) / 100:g}MB"
