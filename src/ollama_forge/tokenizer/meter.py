"""What rendering one template may cost, and what a call would cost before it is made.

In: steps, characters, and the arguments of calls that can make much out of little. Out: nothing, or `LimitReached`.
Steps are about equal in time, so a number of them bounds the time without a clock; the clock is only the last resort.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2

MAX_OUTPUT_CHARS = 16 << 20
MAX_STEPS = 400_000
MAX_SECONDS = 20.0
MAX_COUNT = 100_000
_MAX_INTEGER_BITS = 4096
CHARS_PER_STEP = 64
_TICKS_PER_CLOCK = 4096


class LimitReached(jinja2.TemplateError):
    """The template wants more work, text or memory than it may have."""


class Meter:
    """What one rendering may still spend.

    Args:
        n_input_chars: size of the conversation; work that grows with it is allowed.
    """

    def __init__(self, n_input_chars: int = 0) -> None:
        self._steps_left = MAX_STEPS + n_input_chars // 4
        self._chars_left = MAX_OUTPUT_CHARS + 4 * n_input_chars
        self._deadline = time.monotonic() + MAX_SECONDS
        self._until_clock = _TICKS_PER_CLOCK
        self.emitted = 0
        self.spans: list[tuple[int, int, str]] = []

    def charge(self, steps: int = 1) -> None:
        """Take steps off.

        Raises:
            LimitReached: none are left, or the time is up.
        """
        self._steps_left -= steps
        self._until_clock -= 1
        if self._until_clock <= 0:
            self._until_clock = _TICKS_PER_CLOCK
            if time.monotonic() > self._deadline:
                raise LimitReached(f"it runs for more than {MAX_SECONDS:g} seconds")
        if self._steps_left < 0:
            raise LimitReached(f"it takes more than {MAX_STEPS:,} steps")

    def charge_output(self, n_chars: int) -> None:
        self._chars_left -= n_chars
        if self._chars_left < 0:
            raise LimitReached(f"it writes more than {MAX_OUTPUT_CHARS:,} characters")
        self.charge(1 + n_chars // CHARS_PER_STEP)

    def charge_size(self, value: Any) -> None:
        """Charge for going once through a value, not through what its items hold."""
        if isinstance(value, str):
            self.charge(1 + len(value) // CHARS_PER_STEP)
        elif isinstance(value, (list, tuple, dict, set, range)):
            self.charge(1 + len(value))
        else:
            self.charge()

    def measure(self, value: Any) -> int:
        """About how many characters a value has when it is written, charged for every part.

        A list may hold the same list many times, so a small value can be long to write; this ends when the meter does.
        """
        n_chars = 0
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, str):
                n_chars += len(part) + 4
                self.charge(1 + len(part) // CHARS_PER_STEP)
                continue
            self.charge()
            if isinstance(part, dict):
                waiting += [*part.keys(), *part.values()]
            elif isinstance(part, (list, tuple, set)):
                waiting += part
            n_chars += 4 + (part.bit_length() // 3 if isinstance(part, int) else 28)
        return n_chars

    def allow(self, n_chars: int, what: str) -> None:
        """Refuse a result before it is made."""
        if n_chars > MAX_OUTPUT_CHARS:
            raise LimitReached(f"{what} would make {n_chars:,} characters or items")
        self.charge(1 + max(0, n_chars) // CHARS_PER_STEP)


def check_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    meter.charge()
    if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        meter.allow(len(left) + len(right), "'+'")
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                meter.allow(len(sequence) * max(0, count), "'*'")
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _check_format(meter, str(left), right if isinstance(right, tuple) else (right,), {})


def _check_bits(n_bits: int) -> None:
    if n_bits > _MAX_INTEGER_BITS:
        raise LimitReached(f"a number would have {n_bits:,} bits")


def _check_format(meter: Meter, pattern: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if re.search(r"\d{6}", pattern) or re.search(r":[^{}]*\{", pattern) or "*" in pattern:
        raise LimitReached("a format asks for a width that is too large, or that is not in its text")
    longest = max((meter.measure(value) for value in (*args, *kwargs.values())), default=0)
    meter.allow(len(pattern) + (pattern.count("{") + pattern.count("%")) * longest, "formatting")


def _check_counts(values: Iterable[Any], what: str, limit: int = MAX_COUNT) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > limit:
            raise LimitReached(f"{what} asks for {value:,}")


def _check_replace(meter: Meter, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        meter.allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new), "replacing")


def _check_join(meter: Meter, separator: Any, parts: Sequence[Any]) -> None:
    meter.allow(meter.measure(parts) + len(parts) * meter.measure(separator), "joining")


def check_method(meter: Meter, bound: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    meter.charge_size(bound)
    if isinstance(bound, (int, float)):
        _check_counts((*args, *kwargs.values()), f"{name}()")
    if not isinstance(bound, str):
        return
    if name in ("format", "format_map"):
        _check_format(meter, bound, args, kwargs)
    elif name in ("translate", "maketrans", "encode"):
        raise LimitReached(f"{name}() is not allowed")
    elif name == "join" and args:
        if not isinstance(args[0], (list, tuple, dict, str)):
            raise LimitReached("join() takes a list here; write x | list first")
        _check_join(meter, bound, list(args[0]))
    elif name == "replace" and len(args) >= 2:
        _check_replace(meter, bound, args[0], args[1])
    elif name == "expandtabs":
        _check_counts((*args, *kwargs.values()), "expandtabs()", 16)
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_counts((*args, *kwargs.values()), f"{name}()")


FilterCheck = Callable[[Meter, Any, Sequence[Any], Mapping[str, Any]], Any]


def _counts_checked(what: str, limit: int = MAX_COUNT) -> FilterCheck:
    def check(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        _check_counts((*args, *kwargs.values()), what, limit)
        return value

    return check


def _check_written(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    meter.allow(meter.measure(value), "writing a value")
    return value


def _check_to_json(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    _check_counts((*args, *kwargs.values()), "tojson", 16)
    # each part may stand on a line of its own, behind as many blanks as it is deep
    is_indented = kwargs.get("indent", args[1] if len(args) > 1 else None) is not None
    meter.allow((64 if is_indented else 6) * meter.measure(value), "tojson")
    return value


def _check_indent(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    width = kwargs.get("width", args[0] if args else 4)
    _check_counts((width,), "indent")
    per_line = len(width) if isinstance(width, str) else int(width)
    text = str(value)
    meter.allow(len(text) + (text.count("\n") + 1) * per_line, "indent")
    return text if not isinstance(value, str) else value


def _check_wordwrap(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if any(isinstance(part, str) and len(part) > 16 for part in (*args, *kwargs.values())):
        raise LimitReached("wordwrap joins lines with more than 16 characters")
    meter.charge(len(str(value)))
    return value


def _check_filter_replace(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    old = kwargs.get("old", args[0] if args else "")
    new = kwargs.get("new", args[1] if len(args) > 1 else "")
    _check_replace(meter, str(value), old, new)
    return value


def _check_filter_join(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    parts = list(value) if isinstance(value, Iterable) and not isinstance(value, (list, tuple)) else value
    if isinstance(parts, (list, tuple)):
        _check_join(meter, kwargs.get("d", args[0] if args else ""), parts)
    return parts


def _check_filter_format(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    _check_format(meter, str(value), args, kwargs)
    return value


def _check_sum(meter: Meter, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    start = kwargs.get("start", args[1] if len(args) > 1 else 0)
    if not isinstance(start, (int, float)):
        raise LimitReached("sum adds numbers only")
    return value


FILTER_CHECKS: dict[str, FilterCheck] = {
    "batch": _counts_checked("batch"),
    "center": _counts_checked("center"),
    "e": _check_written,
    "escape": _check_written,
    "format": _check_filter_format,
    "indent": _check_indent,
    "groupby": _check_written,
    "join": _check_filter_join,
    "pprint": _check_written,
    "replace": _check_filter_replace,
    "round": _counts_checked("round", 300),
    "slice": _counts_checked("slice"),
    "sort": _check_written,
    "string": _check_written,
    "sum": _check_sum,
    "tojson": _check_to_json,
    "truncate": _counts_checked("truncate", 1 << 40),
    "unique": _check_written,
    "wordwrap": _check_wordwrap,
}
