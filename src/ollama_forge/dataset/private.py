"""Strings in training data that should perhaps not be learnt: addresses, keys, tokens, card numbers.

In: text. Out: what was found, masked so that it can be shown. A fine-tuned model repeats what it was trained on, to
anybody. Patterns find what looks like a secret; they prove nothing in either direction.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_EDGE = r"(?<![A-Za-z0-9])"
_PATTERNS: dict[str, re.Pattern[str]] = {
    "private key": re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"),
    "Hugging Face token": re.compile(_EDGE + r"hf_[A-Za-z0-9]{20,100}"),
    "GitHub token": re.compile(_EDGE + r"(?:gh[pousr]_[A-Za-z0-9]{30,100}|github_pat_[A-Za-z0-9_]{30,100})"),
    "API key": re.compile(_EDGE + r"sk-[A-Za-z0-9_-]{20,200}"),
    "AWS key": re.compile(_EDGE + r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "Google key": re.compile(_EDGE + r"AIza[A-Za-z0-9_-]{35}"),
    "Slack token": re.compile(_EDGE + r"xox[abprs]-[A-Za-z0-9-]{10,100}"),
    "JSON web token": re.compile(_EDGE + r"eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}"),
    "password": re.compile(
        r"(?i)\b(?:password|passwd|secret|api[_-]?key|access[_-]?token)\s{0,3}[=:]\s{0,3}[^\s\"']{8,100}"
    ),
    "e-mail": re.compile(
        _EDGE + r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,6}\.[A-Za-z]{2,24}"
    ),
    "card number": re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.])"),
}
_RANDOM_WORD = re.compile(r"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_-]{32,200}={0,2}(?![A-Za-z0-9+/_=-])")
_RANDOM_BITS = 4.0


@dataclass(frozen=True)
class PrivateString:
    """Something that looks private; `masked` keeps two characters at each end at most."""

    kind: str
    masked: str


def find_private_strings(text: str) -> tuple[PrivateString, ...]:
    """What looks private in a text, each stretch of it once."""
    return tuple(_search(text))


def _search(text: str) -> Iterator[PrivateString]:
    taken = bytearray(len(text))
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(taken[start:end]) or (kind == "card number" and not _is_card_number(match[0])):
                continue
            taken[start:end] = b"\1" * (end - start)
            yield PrivateString(kind, mask(match[0]))
    for match in _RANDOM_WORD.finditer(text):
        if not any(taken[match.start() : match.end()]) and _looks_random(match[0]):
            yield PrivateString("random string", mask(match[0]))


def mask(text: str) -> str:
    """`anna@example.org` -> `an…rg (16 characters)`; nothing shorter than eight characters is shown at all."""
    shown = f"{text[:2]}…{text[-2:]}" if len(text) >= 8 else "…"
    return f"{shown} ({len(text)} characters)"


def _is_card_number(text: str) -> bool:
    """Luhn's check, which one in ten numbers passes by chance."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [digit if index % 2 else digit * 2 for index, digit in enumerate(reversed(digits), 1)]
    total = sum(digit - 9 if digit > 9 else digit for digit in doubled)
    return total % 10 == 0


def _looks_random(text: str) -> bool:
    """Letters and digits mixed with more bits in each character than words have."""
    if not (any(c.isdigit() for c in text) and any(c.islower() for c in text) and any(c.isupper() for c in text)):
        return False
    counts = Counter(text)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    return entropy >= _RANDOM_BITS
