"""Whether an answer refuses: phrases from a file, looked for where refusals stand and nowhere else.

In: a text file of markers and the text of an answer. Out: the words that refuse, or None. Letter case, apostrophes,
short forms and markdown make no difference; quoted speech and code are not the model's own voice and are left out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ollama_forge.errors import DatasetError, NotFoundError

OPENING_SENTENCES = 3
LIMIT_BYTES = 1 << 20
_MOST_DEPTH = 4
_DEFAULT = "refusal_markers.txt"
_NEVER = re.compile(r"(?!)")
_SHORT_FORMS = tuple(
    (re.compile(rf"\b{short}\b"), long)
    for short, long in (
        ("can't", "cannot"),
        ("cant", "cannot"),
        ("can not", "cannot"),
        ("won't", "will not"),
        ("shan't", "shall not"),
        ("i'm", "i am"),
        ("let's", "let us"),
        ("([a-z]+)n't", r"\1 not"),
        ("([a-z]+)'re", r"\1 are"),
        ("([a-z]+)'ve", r"\1 have"),
        ("([a-z]+)'ll", r"\1 will"),
        ("([a-z]+)'d", r"\1 would"),
        ("(it|that|there|this|what|he|she)'s", r"\1 is"),
    )
)
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`\uff07", "'"))
_QUOTES = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\uff02", '"'))
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTED = re.compile(r'"[^"\n]{1,600}"')
_LINE_MARKS = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-+*\u2022][ \t]+|\d{1,3}[.)][ \t]+)+", re.MULTILINE)
_EMPHASIS = re.compile(r"[*_~]+")
_SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"')\]]*\s+|\n+")
_CLAUSE_START = re.compile(r"\s*[\u2014\u2013;:]\s*|\s+-+\s+|,?\s+(?=but\b)|,\s+(?=however\b|so\b|and i\b)")


@dataclass(frozen=True, eq=False)
class Markers:
    """What a markers file says, ready to be looked for.

    Attributes:
        source: where the file came from.
        anywhere: begins a sentence or clause, wherever it stands.
        opening: the same within the first sentences.
        inside: stands somewhere in the first sentences.
        lead_in: may stand before a refusal.
        exception: begins a sentence that is no refusal.
    """

    source: str
    anywhere: re.Pattern[str]
    opening: re.Pattern[str]
    inside: re.Pattern[str]
    lead_in: re.Pattern[str]
    exception: re.Pattern[str]

    @property
    def key(self) -> str:
        """The same for files that mean the same."""
        parts = (self.anywhere, self.opening, self.inside, self.lead_in, self.exception)
        return hashlib.sha256("\0".join(part.pattern for part in parts).encode()).hexdigest()

    def find(self, text: str) -> str | None:
        """The first words of `text` that refuse, as they are after normalising; None when it does not refuse."""
        for number, sentence in enumerate(_sentences(text)):
            is_opening = number < OPENING_SENTENCES
            for clause in _CLAUSE_START.split(sentence):
                found = self._find_in(self._bare(clause), is_opening)
                if found:
                    return found
            match = self.inside.search(sentence) if is_opening else None
            if match:
                return match[0]
        return None

    def _find_in(self, clause: str, is_opening: bool) -> str | None:
        if self.exception.match(clause):
            return None
        match = self.anywhere.match(clause) or (self.opening.match(clause) if is_opening else None)
        return match[0] if match else None

    def _bare(self, clause: str) -> str:
        """A clause without what may stand before a refusal."""
        while True:
            match = self.lead_in.match(clause)
            if not match or not match.end():
                return clause
            clause = clause[match.end() :].lstrip(" ,.!'\"")


def read_markers(path: Path | None = None) -> Markers:
    """Read a markers file; None: the one of the package (English).

    Raises:
        NotFoundError: no such file.
        DatasetError: it is not text, holds no marker, or a line of it makes no sense.
    """
    if path is None:
        return parse_markers((files("ollama_forge.dataset") / _DEFAULT).read_text(encoding="utf-8"), _DEFAULT)
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFoundError(f"There is no markers file {str(path)!r}", next="Check the path.") from exc
    try:
        if len(raw) > LIMIT_BYTES:
            raise ValueError(f"it has {len(raw):,} bytes")
        text = raw.decode("utf-8-sig")
    except ValueError as exc:
        raise DatasetError(
            f"{str(path)!r} is no list of refusal markers: {exc}",
            why="It is a text file in UTF-8 with one marker a line.",
            next="Leave --markers out to use those of the package.",
        ) from exc
    return parse_markers(text, str(path))


def parse_markers(text: str, source: str = "the markers") -> Markers:
    """The markers of a text; the package's own file explains its form in its first lines.

    Raises:
        DatasetError: no marker, or parentheses that do not match.
    """
    phrases: dict[str, list[str]] = {kind: [] for kind in ("", "^", "~", "+", "!")}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        kind = words[0] if words[0] in "^~+!" else ""
        pattern = _pattern(words[len(kind) :], is_lead_in=kind == "+")
        if pattern is None:
            raise DatasetError(
                f"Line {number} of {source!r} is no marker: {words[:80]!r}",
                why="It needs words, and a parenthesis that opens must close.",
                next="Example of a line: i cannot (help|assist)",
            )
        phrases[kind].append(pattern)
    if not any(phrases[kind] for kind in ("", "^", "~")):
        raise DatasetError(
            f"{source!r} holds no refusal marker",
            why="Empty lines and lines that begin with # do not count.",
            next="Write one a line, for example: i cannot help",
        )
    compiled = {kind: _either(patterns) for kind, patterns in phrases.items()}
    return Markers(source, compiled[""], compiled["^"], compiled["~"], compiled["+"], compiled["!"])


def normalise(text: str) -> str:
    """Lower case, straight apostrophes, short forms written out, no markdown; lines stay lines."""
    plain = unicodedata.normalize("NFKC", _LINE_MARKS.sub("", _CODE.sub(" ", text)))
    plain = _EMPHASIS.sub("", plain).translate(_APOSTROPHES).translate(_QUOTES).casefold()
    plain = "".join(char for char in plain if char in "\n\t" or unicodedata.category(char)[0] != "C")
    for short, long in _SHORT_FORMS:
        plain = short.sub(long, plain)
    return "\n".join(" ".join(line.split()) for line in plain.splitlines()).strip()


def _sentences(text: str) -> list[str]:
    plain = normalise(text)
    own_voice = _QUOTED.sub(" ", plain)
    if not re.search(r"\w", own_voice):
        own_voice = plain.replace('"', "")  # everything is quoted: then it is the answer itself
    return [part.strip(" \"'([") for part in _SENTENCE_END.split(own_voice) if re.search(r"\w", part)]


def _either(patterns: Iterable[str]) -> re.Pattern[str]:
    joined = "|".join(patterns)
    return re.compile(f"(?:{joined})") if joined else _NEVER


def _pattern(phrase: str, *, is_lead_in: bool) -> str | None:
    """A regular expression of nothing but the phrase's words and its alternatives; None when it is malformed."""
    reaches = is_lead_in and phrase.rstrip().endswith("*")
    words = _words(phrase.replace("*", " "))
    pieces: list[str] = []
    depth = 0
    for token in re.findall(r"[()|]|\s+|[^()|\s]+", words):
        if token == "(":
            depth += 1
            pieces.append("(?:")
        elif token == ")":
            depth -= 1
            pieces.append(")")
        elif token == "|":
            pieces.append("|")
        else:
            pieces.append(" ?" if token.isspace() else re.escape(token))
        if depth not in range(_MOST_DEPTH + 1) or (token == "|" and not depth):
            return None
    body = "".join(pieces).strip()
    if depth or not re.search(r"\w", words):
        return None
    return rf"\b{body}[^,]{{0,200}}," if reaches else rf"\b{body}(?![\w'])"


def _words(phrase: str) -> str:
    """The phrase as the text it is compared with is spelled; its own signs stay."""
    plain = unicodedata.normalize("NFKC", phrase).translate(_APOSTROPHES).casefold()
    for short, long in _SHORT_FORMS:
        plain = short.sub(long, plain)
    return " ".join(plain.split())
