"""JSON as Go's encoder writes it, so that the same content gets the same digest from Ollama and from us.

In: dicts, lists, text, numbers. Out: text without spaces; `<`, `>`, `&`, U+2028 and U+2029 escaped; floats as Go
prints them (encoding/json: encode.go `floatEncoder`, `appendString`). Dicts keep their order: a struct's order is the
caller's business, a map is sorted by it.
"""

from __future__ import annotations

import json
import math
import re
import struct

from ollama_forge.errors import FormatError

_ESCAPED = {
    '"': '\\"',
    "\\": "\\\\",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\b": "\\b",
    "\f": "\\f",
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_NEEDS_ESCAPE = re.compile('["\\\\<>&\x00-\x1f\u2028\u2029\ud800-\udfff]')
_MAX_DEPTH = 100
_FLOAT32_MAX = 3.4028234663852886e38


def render_go_json(value: object, *, depth: int = 0) -> str:
    """Go's spelling of a JSON value.

    Raises:
        FormatError: a value that JSON has no word for (NaN, infinity), or a nesting deeper than 100.
    """
    if depth > _MAX_DEPTH:
        raise FormatError("JSON that is nested more than 100 deep cannot be written")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{_NEEDS_ESCAPE.sub(_escape, value)}"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return render_go_float(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(render_go_json(item, depth=depth + 1) for item in value) + "]"
    if isinstance(value, dict):
        members = (f"{render_go_json(str(key))}:{render_go_json(item, depth=depth + 1)}" for key, item in value.items())
        return "{" + ",".join(members) + "}"
    raise FormatError(f"{value!r} cannot be written as JSON")


def render_go_float(value: float) -> str:
    """Shortest digits; an exponent only below 1e-6 and from 1e21 on.

    Raises:
        FormatError: NaN or infinity.
    """
    if not math.isfinite(value):
        raise FormatError(f"{value!r} cannot be written as JSON", next="Use an ordinary number.")
    if value == 0:
        return "-0" if math.copysign(1, value) < 0 else "0"
    mantissa, _, exponent_text = repr(value).partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    exponent = int(exponent_text or 0) + len(whole) - 1
    digits = (whole + fraction).rstrip("0")
    leading = len(digits) - len(digits.lstrip("0"))
    digits = digits[leading:]
    exponent -= leading
    if -6 <= exponent < 21:
        return sign + _plain(digits, exponent)
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{'-' if exponent < 0 else '+'}{abs(exponent)}"


def _plain(digits: str, exponent: int) -> str:
    if exponent < 0:
        return "0." + "0" * (-exponent - 1) + digits
    if len(digits) <= exponent + 1:
        return digits + "0" * (exponent + 1 - len(digits))
    return f"{digits[: exponent + 1]}.{digits[exponent + 1 :]}"


def round_to_float32(value: float) -> float:
    """The float that Go prints after it has kept `value` in 32 bits: the shortest decimal that names that float32.

    Raises:
        OverflowError: larger than any float32.
    """
    if not math.isfinite(value):
        return value
    packed = struct.pack("<f", value)
    narrow: float = struct.unpack("<f", packed)[0]
    for digits in range(1, 9):
        candidate = float(f"{narrow:.{digits}g}")
        if abs(candidate) <= _FLOAT32_MAX and struct.pack("<f", candidate) == packed:
            return candidate
    return float(f"{narrow:.9g}")


def parse_json_object(raw: bytes | str, *, limit_bytes: int, what: str) -> dict[str, object]:
    """Read one JSON object, bounded.

    Raises:
        FormatError: too large, not JSON, nested too deep, or not an object.
    """
    if len(raw) > limit_bytes:
        raise FormatError(f"{what} is {len(raw):,} bytes, and more than {limit_bytes:,} are not read")
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{what} is not JSON", why=f"{exc}") from exc
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object but {type(value).__name__}")
    return value


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if "\ud800" <= character <= "\udfff":
        return "\\ufffd"
    return _ESCAPED.get(character) or f"\\u{ord(character):04x}"


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON")
