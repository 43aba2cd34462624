"""A conversation as the model reads it: token ids, and which of them it has to learn to write.

In: an `Example` and a `ChatFormat`. Out: a `RenderedExample` whose ids are those that the engine would send and
receive. The rules:

- Loss is on assistant turns only, from the end of the prompt on, and the token that ends the turn is learnt.
- The text becomes tokens as the engine makes them: a prompt at once, and an answer as what follows it. Where one token
  would reach over the border, the text is divided there. Where that cannot be done, the token belongs to the answer
  because its last character does, and is counted as straddling.
- The begin token stands once in front where the engine puts it there, whether or not the template writes it too.
- What the engine would show differently is not guessed: an answer whose place is not certain is an error, or is left
  out and counted.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollama_forge.dataset.chat_format import ChatFormat
from ollama_forge.dataset.examples import Example, Source, Turn, answered_turns
from ollama_forge.dataset.locate import Answer, Render, locate_answer, missing_prompt
from ollama_forge.errors import TemplateError, UsageError
from ollama_forge.tokenizer.encode import GGUFTokenizer
from ollama_forge.tokenizer.template import Rendered

NOT_LEARNT = -100
"""The label of a token that carries no loss, as torch's cross entropy ignores it."""

LEARN = ("assistant", "last", "all")
VIEWS = ("engine", "transformers")

NOTES = {
    "shown differently": "answers are shown differently once more turns follow; they were found by their text",
    "only the last": "only the last answer is learnt: where the earlier ones stand could not be told exactly",
    "prompt completed": "what the template writes only when it asks for an answer was put before the last one",
    "straddling": "answers begin inside a token that the prompt begins",
    "end added": "the template ends an answer without an end token; the tokenizer's was added after the last one",
    "no end": "answers before the last end without an end token",
    "system merged": "the template takes no system prompt; it was put in front of the next message, as the engine does",
    "no template": "the model has no chat template: Alpaca blocks (### Instruction:) were used",
}
"""Kinds of notes, counted per example, and what they mean."""


@dataclass(frozen=True)
class RenderOptions:
    """How conversations are shown and what is learnt of them.

    Attributes:
        learn: `assistant` (every answer), `last` (the last answer), `all` (every token).
        view: `engine`: `tools` is undefined when there are none, `enable_thinking` is what llama.cpp would set;
            `transformers`: `tools` is None, `enable_thinking` undefined.
        variables: of the template, over those of the view: `{"enable_thinking": False}`.
        is_strict: an answer whose place is not certain is an error, even where the last one's is.
    """

    learn: str = "assistant"
    view: str = "engine"
    variables: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("learn", self.learn, LEARN), ("view", self.view, VIEWS)):
            if value not in known:
                raise UsageError(f"{name} is {value!r}", next=f"Choose one of: {', '.join(known)}")


@dataclass(frozen=True)
class RenderedExample:
    """An example in tokens.

    Attributes:
        text: what the tokens stand for; an end token that was added is not in it.
        input_ids: token ids.
        labels: the same id where it is learnt, `NOT_LEARNT` elsewhere. Not shifted.
        offsets: (start, end) of each token in `text`.
        source: of the example.
    """

    text: str
    input_ids: array[int]
    labels: array[int]
    offsets: tuple[tuple[int, int], ...]
    source: Source

    @property
    def n_learnt(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(NOT_LEARNT)


def render_prompt(
    chat_format: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    options: RenderOptions | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The token ids that the engine sends to have the conversation answered.

    Raises:
        TemplateError: the model has no template, or it refuses the conversation.
    """
    shown = _prepare_messages(chat_format, messages, Counter())
    text = _render(chat_format, shown, True, tools, options or RenderOptions()).text
    return [token_id for token_id, _, _ in _tokenize(chat_format, text)]


def render_example(
    chat_format: ChatFormat, example: Example, options: RenderOptions | None = None, notes: Counter[str] | None = None
) -> RenderedExample:
    """The token ids of an example and what is learnt of them.

    Args:
        notes: kinds of `NOTES` are counted here.

    Raises:
        TemplateError: the template refuses the conversation, or the place of an answer cannot be told; the error names
            the example and the turn.
    """
    options = options or RenderOptions()
    notes = Counter() if notes is None else notes
    if chat_format.template is None:
        text, answers, n_turns = _plain_text(chat_format, example, notes)
    else:
        text, answers, n_turns = _chat_text(chat_format, example, options, notes)
    tokens = _tokenize_around(chat_format, text, [answer.start for answer in answers])
    learnt = bytearray(len(tokens))
    found: set[str] = set()
    last_characters = _last_characters(chat_format, tokens)
    for answer in answers[-1:] if options.learn == "last" else answers:
        first = bisect_left(last_characters, answer.start)
        last = bisect_left(last_characters, answer.end)
        last = _mark(chat_format, text, tokens, (first, last), learnt, found) if first < last else first
        if first < last and tokens[first][1] < answer.start:
            found.add("straddling")
        if last == len(tokens) and answer.turn == n_turns - 1 and not _ends(chat_format, tokens[first:last]):
            _append_end(chat_format, text, tokens, learnt, found)
    if options.learn == "all":
        learnt = bytearray([1]) * len(tokens)
    notes.update(found)
    ids = array("i", (token_id for token_id, _, _ in tokens))
    labels = array("i", (token[0] if flag else NOT_LEARNT for token, flag in zip(tokens, learnt, strict=True)))
    return RenderedExample(text, ids, labels, tuple((start, end) for _, start, end in tokens), example.source)


# --- text -------------------------------------------------------------------------------------------------------------


def _chat_text(
    chat_format: ChatFormat, example: Example, options: RenderOptions, notes: Counter[str]
) -> tuple[str, list[Answer], int]:
    messages = _prepare_messages(chat_format, example.messages(), notes)
    shift = len(example.turns) - len(messages)
    wanted = [turn - shift for turn in answered_turns(example)]
    if options.learn == "last":
        wanted = wanted[-1:]
    tools = example.tool_schemas()

    def render(part: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return _render(chat_format, part, add_generation_prompt, tools, options).text

    try:
        rendered = _render(chat_format, messages, False, tools, options)
    except TemplateError as exc:
        raise TemplateError(f"{example.source}: {exc.what}", why=exc.why, next=exc.next) from exc
    marked = _marked_answers(rendered, messages, wanted)
    if marked is not None:
        return *_complete_prompt(render, messages, rendered.text, marked, notes), len(messages)
    places = [(turn, locate_answer(render, messages, rendered.text, turn)) for turn in wanted]
    answers = [answer for _, answer in places if answer is not None]
    missing = [turn for turn, answer in places if answer is None]
    if missing:
        if options.is_strict or places[-1][1] is None:
            raise TemplateError(
                f"{example.source}: where the answer in turn {missing[-1] + shift + 1} stands cannot be told exactly",
                why="The chat template shows this conversation in a way that hides where the answer begins or ends.",
                next="Split the conversation so that this answer comes last, or learn every token: --loss all",
            )
        notes["only the last"] += 1
        answers = answers[-1:]
    text, answers = _complete_prompt(render, messages, rendered.text, answers, notes)
    if any(not answer.is_exact for answer in answers):
        notes["shown differently"] += 1
    return text, answers, len(messages)


def _complete_prompt(
    render: Render, messages: Sequence[Mapping[str, Any]], text: str, answers: list[Answer], notes: Counter[str]
) -> tuple[str, list[Answer]]:
    """Put before the last answer what the engine's prompt has there and the finished text has not."""
    if not answers or answers[-1].turn != len(messages) - 1 or answers[-1].is_exact:
        return text, answers
    *earlier, last = answers
    missing = missing_prompt(render, messages, text, last)
    if not missing:
        return text, answers
    notes["prompt completed"] += 1
    moved = Answer(last.turn, last.start + len(missing), last.end + len(missing), is_exact=True)
    return text[: last.start] + missing + text[last.start :], [*earlier, moved]


def _marked_answers(
    rendered: Rendered, messages: Sequence[Mapping[str, Any]], wanted: Sequence[int]
) -> list[Answer] | None:
    """What the template itself marks with `{% generation %}`, where there is one mark for each assistant turn."""
    speaking = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not rendered.spans or len(rendered.spans) != len(speaking):
        return None
    return [
        Answer(turn, start, end, is_exact=False)  # whether the prompt stands before it is not known yet
        for turn, (start, end) in zip(speaking, rendered.spans, strict=True)
        if turn in wanted
    ]


def _plain_text(chat_format: ChatFormat, example: Example, notes: Counter[str]) -> tuple[str, list[Answer], int]:
    """Text for a model without a chat template: prompt and completion as they are, else Alpaca blocks."""
    wanted = answered_turns(example)
    tokenizer = chat_format.tokenizer
    end = "" if tokenizer.eos_id is None else tokenizer.tokens[tokenizer.eos_id]
    if not example.is_plain:
        notes["no template"] += 1
    text, answers = "", []
    guide = "\n\n".join(turn.content for turn in example.turns if turn.role in ("system", "developer") and turn.content)
    for index, turn in enumerate(example.turns):
        if turn.role in ("user", "tool"):
            text += turn.text if example.is_plain else _alpaca_prompt(turn, guide)
            guide = ""
        elif turn.role == "assistant":
            if index in wanted:
                answers.append(Answer(index, len(text), len(text) + len(turn.content), is_exact=True))
            text += turn.content
            if index < len(example.turns) - 1:
                text += end + "\n\n"
    return text, answers, len(example.turns)


ALPACA_GO_TEMPLATE = (
    "### Instruction:\n{{ .Prompt }}\n\n"
    + "### Input:\n{{ if .System }}{{ .System }}{{ else }}(none){{ end }}\n\n"
    + "### Response:\n"
)
"""The Ollama template that sends what `render_example` trains a model without a chat template on."""


def _alpaca_prompt(turn: Turn, guide: str) -> str:
    material = "\n\n".join(part for part in (guide, turn.material) if part)
    return f"### Instruction:\n{turn.content}\n\n### Input:\n{material or '(none)'}\n\n### Response:\n"


def _prepare_messages(
    chat_format: ChatFormat, messages: Sequence[Mapping[str, Any]], notes: Counter[str]
) -> Sequence[Mapping[str, Any]]:
    if chat_format.takes_system or len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    notes["system merged"] += 1
    guide, following = messages[0], messages[1]
    return [{**following, "content": f"{guide['content']}\n{following['content']}"}, *messages[2:]]


def _render(
    chat_format: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    options: RenderOptions,
) -> Rendered:
    template = chat_format.template
    if template is None:
        raise TemplateError(
            "The model has no chat template", why="It is a base model.", next="Give it one, or train on plain text."
        )
    variables = dict(options.variables)
    absent: list[str] = []
    if options.view == "engine":
        variables.setdefault("enable_thinking", chat_format.knows_thinking)
        absent += [] if tools else ["tools"]
        absent += [] if add_generation_prompt else ["add_generation_prompt"]
    return template.render_spans(messages, add_generation_prompt, tools, absent=absent, **variables)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokenize(chat_format: ChatFormat, text: str) -> list[tuple[int, int, int]]:
    """(id, start, end) of each token, the begin token once in front where the engine puts it."""
    tokenizer = chat_format.tokenizer
    if not tokenizer.adds_bos or tokenizer.bos_id is None:
        return tokenizer.encode_offsets(text)
    begin = tokenizer.tokens[tokenizer.bos_id]
    skip = len(begin) if text.startswith(begin) else 0
    placed = tokenizer.encode_offsets(text[skip:])
    return [(tokenizer.bos_id, 0, skip), *((token_id, start + skip, end + skip) for token_id, start, end in placed)]


def _tokenize_around(chat_format: ChatFormat, text: str, borders: Sequence[int]) -> list[tuple[int, int, int]]:
    """As `_tokenize`, with no token reaching over a border where that can be done."""
    tokens = _tokenize(chat_format, text)
    ends = [end for _, _, end in tokens]
    cuts = []
    for border in borders:
        index = bisect_right(ends, border)
        if index < len(tokens) and tokens[index][1] < border:
            cuts.append(border)
    if not cuts:
        return tokens
    divided = _tokenize(chat_format, text[: cuts[0]])
    for cut, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        piece = _continue(chat_format.tokenizer, text[cut:stop])
        if piece is None:
            return tokens
        divided += [(token_id, start + cut, end + cut) for token_id, start, end in piece]
    return divided


def _continue(tokenizer: GGUFTokenizer, text: str) -> list[tuple[int, int, int]] | None:
    """The tokens of a text that goes on after another; None where the tokenizer cannot be asked for that.

    SentencePiece puts a space in front of whatever it is given: the text is given behind a character that nothing in it
    joins, and that character's tokens are taken away again.
    """
    if tokenizer.kind != "llama":
        return tokenizer.encode_offsets(text)
    for lead in ("\n", "\x01", "|"):
        placed = tokenizer.encode_offsets(lead + text)
        if not any(start < 1 < end for _, start, end in placed):
            return [(token_id, start - 1, end - 1) for token_id, start, end in placed if start >= 1]
    return None


def _last_characters(chat_format: ChatFormat, tokens: Sequence[tuple[int, int, int]]) -> list[int]:
    """The last character of each token; an end token that swallows blanks on its right ends before them."""
    spellings, end_ids = chat_format.tokenizer.tokens, chat_format.end_ids
    return [
        max(start, (min(end, start + len(spellings[token_id])) if token_id in end_ids else end) - 1)
        for token_id, start, end in tokens
    ]


def _mark(
    chat_format: ChatFormat,
    text: str,
    tokens: Sequence[tuple[int, int, int]],
    span: tuple[int, int],
    learnt: bytearray,
    found: set[str],
) -> int:
    """Mark the tokens of an answer and the one that ends it; returns where that is."""
    first, last = span[0], _cut_after_end(chat_format, text, tokens, *span)
    if not _ends(chat_format, tokens[first:last]) and last < len(tokens):
        found.add("no end")
    learnt[first:last] = b"\1" * (last - first)
    return last


def _cut_after_end(
    chat_format: ChatFormat, text: str, tokens: Sequence[tuple[int, int, int]], first: int, last: int
) -> int:
    """Where the turn really ends: after the first end token among what only blanks and end tokens follow."""

    def is_tail(index: int) -> bool:
        token_id, start, end = tokens[index]
        return token_id in chat_format.end_ids or not text[start:end].strip()

    tail = last
    while tail > first and is_tail(tail - 1):
        tail -= 1
    ahead = last
    while ahead < len(tokens) and is_tail(ahead):
        ahead += 1
    return next((index + 1 for index in range(tail, ahead) if tokens[index][0] in chat_format.end_ids), last)


def _ends(chat_format: ChatFormat, tokens: Sequence[tuple[int, int, int]]) -> bool:
    return bool(tokens) and tokens[-1][0] in chat_format.end_ids


def _append_end(
    chat_format: ChatFormat, text: str, tokens: list[tuple[int, int, int]], learnt: bytearray, found: set[str]
) -> None:
    end_id = chat_format.tokenizer.eos_id
    if end_id is None:
        found.add("no end")
        return
    if chat_format.template is not None:
        found.add("end added")
    tokens.append((end_id, len(text), len(text)))
    learnt.append(1)
