"""What other types would cost a model, measured once and kept: the numbers behind `quantize --fit`.

In: an open GGUF file, a text and groups of tensors. Out: divergences in nats. Every number that was measured is kept in
a file of OLLAMA_FORGE_HOME, named after the model's hash and everything else that it depends on; so another size costs
next to nothing, and a run that was interrupted goes on where it was. torch is loaded when something has to be measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.windows import Window, cut_windows, text_ids
from ollama_forge.errors import UsageError
from ollama_forge.files import Advance, write_bytes
from ollama_forge.gguf.budget import Group
from ollama_forge.gguf.fit_groups import GroupPlan, cost_of_options
from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import GGMLType
from ollama_forge.registry.registry_file import forge_home
from ollama_forge.tokenizer.encode import build_tokenizer

if TYPE_CHECKING:
    from ollama_forge.train.probe import Probe

WINDOW_TOKENS = 256
N_WINDOWS = 4
MIN_WINDOW_TOKENS = 16
_VERSION = 1


@dataclass(frozen=True)
class FitText:
    """Short windows, spread over a text: some to find a mix with, others to judge it by.

    Attributes:
        search, judge: the same windows where the text is too short for both.
    """

    search: tuple[Window, ...]
    judge: tuple[Window, ...]

    @property
    def tokens_per_pass(self) -> int:
        return sum(len(window.input_ids) for window in self.search)

    @property
    def is_shared(self) -> bool:
        """Whether the mix is judged by the very text that it was found with."""
        return self.search == self.judge


def cut_fit_text(file: GGUFFile, text: str, longest: int | None) -> FitText:
    """Take the windows from a text.

    Raises:
        UsageError: the text is too short.
        TokenizerError: the file has no vocabulary that text can be given to.
    """
    tokenizer = build_tokenizer(file.metadata)
    ids = text_ids(tokenizer, text)
    length = min(WINDOW_TOKENS, longest or WINDOW_TOKENS, len(ids) // (2 * N_WINDOWS))
    if length < MIN_WINDOW_TOKENS:
        length = min(WINDOW_TOKENS, longest or WINDOW_TOKENS, len(ids))
    if length < MIN_WINDOW_TOKENS:
        raise UsageError(
            f"The text has {len(ids)} tokens",
            why="The mix of types is found by what the model makes of it; a few hundred tokens are the least.",
            next="Give a longer one with --text FILE, or leave the option out for the text of this package.",
        )
    windows = cut_windows(tokenizer, ids, length)
    wanted = min(len(windows), 2 * N_WINDOWS)
    spread = [windows[number * len(windows) // wanted] for number in range(wanted)]
    if len(spread) < 2:
        return FitText(tuple(spread), tuple(spread))
    return FitText(tuple(spread[0::2]), tuple(spread[1::2]))


class FitMeasurements:
    """Measured numbers of one model, from the file that keeps them or from running the model.

    Args:
        file: the model, open.
        model_sha256: of its bytes.
        text: what it is run on.
        imatrix: what the quantizer may know.
        device: `auto`, `cpu` or `cuda`.
        say: told what is going on, in sentences.

    Use it in a `with` block: the model is loaded when it is first needed and given back at the end.
    """

    def __init__(
        self,
        file: GGUFFile,
        model_sha256: str,
        text: FitText,
        imatrix: Imatrix | None,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        self._file = file
        self._text = text
        self._imatrix = imatrix
        self._device = device
        self._say = say
        self._stack = contextlib.ExitStack()
        self._probe: tuple[Sequence[Window], Probe] | None = None
        self._models: tuple[Any, Any] | None = None
        self._n_expected = 0
        self.n_run = 0
        self.path = forge_home() / "fit" / f"{_key(model_sha256, text, imatrix)}.json"
        self._kept: dict[str, dict[str, float]] = _read_kept(self.path)

    def __enter__(self) -> FitMeasurements:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._probe = self._models = None

    def missing(self, plan: GroupPlan) -> int:
        """How many runs of the model `sensitivities` will take."""
        return sum(
            _types_key(group.tensors, group.options[number].types) not in self._kept["search"]
            for group, numbers in zip(plan.groups, plan.measured, strict=True)
            for number in numbers
        )

    def sensitivities(self, plan: GroupPlan, advance: Advance) -> tuple[Group, ...]:
        """The groups with what each option costs: measured one group at a time, the rest worked out."""
        self._n_expected = self.missing(plan)
        priced = []
        for group, numbers in zip(plan.groups, plan.measured, strict=True):
            costs = {}
            is_new = False
            for number in numbers:
                key = _types_key(group.tensors, group.options[number].types)
                if key not in self._kept["search"]:
                    types = dict(zip(group.tensors, group.options[number].types, strict=True))
                    self._kept["search"][key] = self._run(self._text.search, types)
                    is_new = True
                    advance(self._text.tokens_per_pass)
                costs[number] = self._kept["search"][key]
            errors = [self._error(group, number) for number in range(len(group.options))]
            priced.append(cost_of_options(group, costs, errors))
            if is_new:
                self._keep()
        self._keep()
        return tuple(priced)

    def judge(self, mixes: Sequence[Mapping[str, GGMLType]], advance: Advance) -> list[float]:
        """What whole mixes cost, on the windows that the mix was not found with."""
        keys = [self._mix_key(types) for types in mixes]
        self._n_expected = sum(key not in self._kept["judge"] for key in keys)
        for key, types in zip(keys, mixes, strict=True):
            if key not in self._kept["judge"]:
                self._kept["judge"][key] = self._run(self._text.judge, types)
                self._keep()
            advance(1)
        return [self._kept["judge"][key] for key in keys]

    def _mix_key(self, types: Mapping[str, GGMLType]) -> str:
        changed = sorted(name for name, type in types.items() if type != self._file.tensors[name].type)
        return hashlib.sha256(_types_key(changed, [types[name] for name in changed]).encode()).hexdigest()

    def _error(self, group: Group, number: int) -> float:
        from ollama_forge.gguf.weight_error import weight_error

        option = group.options[number]
        total = weight = 0.0
        for name, type in zip(group.tensors, option.types, strict=True):
            key = f"{name}={type.name}"
            if key not in self._kept["errors"]:
                self._kept["errors"][key] = weight_error(self._file, name, type, self._imatrix)
            size = self._file.tensors[name].nbytes
            total += self._kept["errors"][key] * size
            weight += size
        return total / weight if weight else 0.0

    def _run(self, windows: Sequence[Window], types: Mapping[str, GGMLType]) -> float:
        if self._probe is None or self._probe[0] != windows:
            self._probe = (windows, self._open_probe(windows))
        self.n_run += 1
        return self._probe[1].divergence(types)

    def _open_probe(self, windows: Sequence[Window]) -> Probe:
        from ollama_forge.train.probe import Probe
        from ollama_forge.train.scored_model import ScoreOptions, scored_model

        if self._models is None:
            options = ScoreOptions(is_exact=True, device=self._device)
            first, second = (self._stack.enter_context(scored_model(self._file, options=options)) for _ in range(2))
            self._models = (first, second)
        self._probe = None  # the old one's memory first
        started = time.monotonic()
        packed, reference = self._models
        probe = Probe(packed, reference, windows, self._imatrix)
        seconds = time.monotonic() - started
        minutes = seconds * self._n_expected / 60
        self._say(f"A run takes about {seconds:.1f} s: about {minutes:.1f} minutes for {self._n_expected}.")
        return probe

    def _keep(self) -> None:
        text = json.dumps({"version": _VERSION, **self._kept}, indent=1, sort_keys=True)
        write_bytes(self.path, text.encode(), overwrite=True)


def _key(model_sha256: str, text: FitText, imatrix: Imatrix | None) -> str:
    total = hashlib.sha256(f"{_VERSION} {model_sha256}".encode())
    for windows in (text.search, text.judge):
        for window in windows:
            total.update(window.input_ids.tobytes() + window.labels.tobytes())
    for name in sorted(imatrix.entries) if imatrix is not None else ():
        total.update(name.encode() + imatrix.weights(name).tobytes() if imatrix is not None else b"")
    return total.hexdigest()[:32]


def _types_key(names: Sequence[str], types: Sequence[GGMLType]) -> str:
    return " ".join(f"{name}={type.name}" for name, type in zip(names, types, strict=True))


def _read_kept(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; a file that is damaged or of another version counts as none."""
    empty: dict[str, dict[str, float]] = {"search": {}, "judge": {}, "errors": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        return empty
    kept = {name: found.get(name) for name in empty}
    is_whole = all(
        isinstance(part, dict) and all(isinstance(value, (int, float)) and value >= 0 for value in part.values())
        for part in kept.values()
    )
    return {name: dict(part) for name, part in kept.items() if part is not None} if is_whole else empty
