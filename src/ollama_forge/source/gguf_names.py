"""Which of a repo's GGUF files is which, by name, and which one to take. Pure: names and sizes in, a choice out.

A name is parsed, never searched: `Q4_K_M` is a word of the file's name (or of its folder's), `-00001-of-00003` a part
of a set, `mmproj` a projector for pictures or sound, `imatrix` no model at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ollama_forge.errors import HubError, NotFoundError, UsageError
from ollama_forge.source.hub_files import HubFile, RepoListing

_WORD = (
    r"(?:UD-)?(?:IQ\d_(?:XXS|XS|NL|S|M)|Q4_0_\d_\d|Q\d_K_(?:XXL|XL|XS|S|M|L)|Q\d_K|Q\d_[01]|TQ\d_0|MXFP4_MOE|MXFP4|NVFP4"
    r"|BF16|FP16|FP32|F16|F32)"
)
_QUANT = re.compile(rf"(?<![A-Za-z0-9])({_WORD})(?![A-Za-z0-9])", re.IGNORECASE)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_PROJECTOR = re.compile(r"(?<![a-z0-9])mm-?proj(?![a-z0-9])", re.IGNORECASE)
_IMATRIX = re.compile(r"(?<![a-z0-9])imatrix(?![a-z0-9])", re.IGNORECASE)
_SAME = {"FP16": "F16", "FP32": "F32"}

BEST_FIRST = (
    *("Q8_0", "Q6_K_L", "Q6_K", "Q5_K_L", "Q5_K_XL", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_XL", "Q4_K_L"),
    *("Q4_K_M", "IQ4_NL", "Q4_K_S", "IQ4_XS", "Q4_1", "MXFP4_MOE", "MXFP4", "Q4_0", "Q3_K_XL", "Q3_K_L"),
    *("Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_XL", "Q2_K_L", "Q2_K", "IQ2_M", "IQ2_S"),
    *("IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S"),
)
"""By quality (KL divergence to 16 bits, as llama.cpp's own tables order them). 16 and 32 bits are not among them: they
take twice the memory and time of Q8_0, and no answer is different."""

_KNOWN = frozenset((*BEST_FIRST, *(f"UD-{name}" for name in BEST_FIRST)))

_PROJECTOR_ORDER = ("F16", "BF16", "Q8_0", "F32")
_RUN_BYTES = 600_000_000
_MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class GGUFChoice:
    """One model in a repo: a file, or the set of its parts in order.

    Attributes:
        stem: its name without quantization, part and ending; what else is called so is the same model.
        quant: as the name says it, in capitals; empty when it does not say.
    """

    stem: str
    quant: str
    files: tuple[HubFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def path(self) -> str:
        """The first (mostly only) file."""
        return self.files[0].path

    @property
    def label(self) -> str:
        return self.quant or self.path


@dataclass(frozen=True)
class Pick:
    """What was chosen.

    Attributes:
        why: in words, when it was not asked for by name.
        projector: the file that a model which sees or hears needs beside its weights.
    """

    choice: GGUFChoice
    why: str
    others: tuple[GGUFChoice, ...]
    projector: HubFile | None


def parse_quant(path: str) -> str:
    """The quantization that a file's name (else its folder's) says: `Q4_K_M`, `UD-Q4_K_XL`, `BF16`; else empty."""
    parts = PurePosixPath(path)
    for text in (parts.stem, *reversed(parts.parts[:-1])):
        found = _QUANT.findall(text)
        if found:
            word = found[-1].upper()
            return _SAME.get(word, word)
    return ""


def is_projector(path: str) -> bool:
    """Whether a name says that it is an mmproj."""
    return bool(_PROJECTOR.search(path))


def is_imatrix(path: str) -> bool:
    """Whether a name says that it is an importance matrix; `model-imatrix-Q4_K_M.gguf` was only made with one."""
    stem = PurePosixPath(path).stem
    return bool(_IMATRIX.search(stem)) and (stem.lower().startswith("imatrix") or not _QUANT.search(stem))


def list_choices(files: Iterable[HubFile]) -> tuple[GGUFChoice, ...]:
    """The models among files, parts put together; projectors and importance matrices are none.

    Raises:
        HubError: a part is missing.
    """
    sets: dict[str, dict[int, HubFile]] = {}
    totals: dict[str, int] = {}
    for file in sorted(files, key=lambda file: file.path):
        path = file.path
        if not path.lower().endswith(".gguf") or is_projector(path) or is_imatrix(path):
            continue
        match = _SHARD.fullmatch(path[: -len(".gguf")])
        key = match["stem"] if match else path[: -len(".gguf")]
        totals[key] = int(match["total"]) if match else 1
        sets.setdefault(key, {})[int(match["number"]) if match else 1] = file
    choices = []
    for key, parts in sets.items():
        missing = [number for number in range(1, totals[key] + 1) if number not in parts]
        if missing:
            raise HubError(
                f"Part {missing[0]} of {totals[key]} of {key!r} is not there",
                why="A split model is of no use without all its parts.",
                next="Choose another quantization with --quant, or another repo.",
            )
        ordered = tuple(parts[number] for number in sorted(parts))
        choices.append(GGUFChoice(_stem(key), parse_quant(key + ".gguf"), ordered))
    return tuple(choices)


def _stem(key: str) -> str:
    name = PurePosixPath(key).name
    return _QUANT.sub("", name).strip("-._ ").lower()


def list_projectors(files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """The projectors, the one to prefer first."""
    found = [file for file in files if file.path.lower().endswith(".gguf") and is_projector(file.path)]

    def rank(file: HubFile) -> tuple[int, str]:
        quant = parse_quant(file.path)
        return (_PROJECTOR_ORDER.index(quant) if quant in _PROJECTOR_ORDER else len(_PROJECTOR_ORDER), file.path)

    return tuple(sorted(found, key=rank))


def pick_gguf(listing: RepoListing, *, quant: str = "", file: str = "", memory_bytes: int | None = None) -> Pick:
    """The model that was asked for, or the best that fits.

    Args:
        quant: `Q4_K_M`, in any case; exactly this one, never another.
        file: a path in the repo.
        memory_bytes: this machine's; None when it does not say.

    Raises:
        NotFoundError: no GGUF, no such file, no such quantization; those that exist are listed.
        UsageError: several different models have it.
    """
    choices = list_choices(listing.files)
    projectors = list_projectors(listing.files)
    projector = projectors[0] if projectors else None
    if file:
        return Pick(_named(listing, choices, file), "", choices, projector)
    if not choices:
        hint = (
            f"ollama-forge import {listing.repo} --name NAME   (it has safetensors)"
            if listing.has_safetensors
            else "Look for a repo with GGUF in its name, or for one with safetensors and `ollama-forge import`."
        )
        raise NotFoundError(f"{listing.repo!r} has no GGUF model", next=hint)
    if quant:
        return Pick(_quantized(listing, choices, quant), "", choices, projector)
    choice, why = _best(listing, choices, memory_bytes)
    return Pick(choice, why, choices, projector)


def _named(listing: RepoListing, choices: Sequence[GGUFChoice], path: str) -> GGUFChoice:
    for choice in choices:
        if any(path in (file.path, file.name) for file in choice.files):
            return choice
    exact = listing.by_path.get(path)
    if exact is not None and not path.lower().endswith(".gguf"):
        raise UsageError(f"{path!r} is not a GGUF file", next="Name a file that ends with .gguf.")
    if exact is not None:
        what = "a projector for pictures or sound" if is_projector(path) else "an importance matrix"
        raise UsageError(
            f"{path!r} is {what}, not a model",
            next=f"Choose one of: {_listed(choices)}",
        )
    near = difflib.get_close_matches(path, [file.path for file in listing.files], n=1)
    raise NotFoundError(
        f"{listing.repo!r} has no file {path!r}",
        why=f"The nearest name is {near[0]!r}." if near else f"It has {_listed(choices)}.",
        next=f"ollama-forge fetch {listing.repo} --gguf-file {near[0] if near else 'FILE'}",
    )


def _quantized(listing: RepoListing, choices: Sequence[GGUFChoice], quant: str) -> GGUFChoice:
    wanted = _SAME.get(quant.upper(), quant.upper())
    found = [choice for choice in choices if choice.quant == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise _several(listing, found)
    known = sorted({choice.quant for choice in choices if choice.quant}, key=_rank)
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    raise NotFoundError(
        f"{listing.repo!r} has no {wanted}",
        why=f"It has {', '.join(known)}." if known else f"Its files do not say: {_listed(choices)}.",
        next=f"ollama-forge fetch {listing.repo} --quant {near[0]}" if near else f"Choose one of: {_listed(choices)}",
    )


def _best(listing: RepoListing, choices: Sequence[GGUFChoice], memory_bytes: int | None) -> tuple[GGUFChoice, str]:
    ranked = sorted(choices, key=lambda choice: (_rank(choice.quant), choice.size_bytes))
    if len(choices) == 1:
        return choices[0], "the only one there is"
    if len({choice.stem for choice in choices}) > 1:
        raise _several(listing, choices)
    smallest = min(choices, key=lambda choice: choice.size_bytes)
    if memory_bytes is None:
        middle = next((choice for choice in ranked if _rank(choice.quant) >= _rank("Q4_K_M")), ranked[-1])
        return middle, "this system does not say how much memory it has, so the usual one was taken"
    budget = int(memory_bytes * _MEMORY_SHARE)
    limit = f"{_MEMORY_SHARE:.0%} of this machine's memory is {budget / 1e9:.1f} GB"
    for choice in ranked:
        if needed_bytes(choice.size_bytes) <= budget and choice.quant in _KNOWN:
            takes = f"{needed_bytes(choice.size_bytes) / 1e9:.1f} GB"
            return choice, f"the best of {len(choices)} that fits: it runs in about {takes}, and {limit}"
    if needed_bytes(smallest.size_bytes) <= budget:
        return smallest, f"the smallest of {len(choices)}"
    takes = f"{needed_bytes(smallest.size_bytes) / 1e9:.1f} GB"
    return smallest, (
        f"the smallest of {len(choices)}, and even this one runs in about {takes} while {limit}: "
        "it will be slow or not load"
    )


def needed_bytes(file_bytes: int) -> int:
    """Memory that running a file of that size takes, roughly: the weights, a few thousand tokens, the buffers."""
    return int(file_bytes * 1.1) + _RUN_BYTES


def _rank(quant: str) -> int:
    """0 is best. A dynamic mix (UD) comes just before the plain one of its name; unknown ones come last."""
    plain = quant.removeprefix("UD-")
    if plain in BEST_FIRST:
        return 2 * BEST_FIRST.index(plain) + (0 if quant.startswith("UD-") else 1)
    return 2 * len(BEST_FIRST) + (1 if quant else 2)


def _several(listing: RepoListing, found: Sequence[GGUFChoice]) -> UsageError:
    return UsageError(
        f"{listing.repo!r} has {len(found)} models that this could mean",
        why=", ".join(choice.path for choice in found[:8]) + (", ..." if len(found) > 8 else ""),
        next=f"ollama-forge fetch {listing.repo} --gguf-file {found[0].path}",
    )


def _listed(choices: Sequence[GGUFChoice]) -> str:
    names = sorted({choice.label for choice in choices}, key=_rank)
    return ", ".join(names[:20]) or "no GGUF model"
