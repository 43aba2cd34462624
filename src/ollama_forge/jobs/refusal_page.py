"""A refusal report as one HTML page that loads nothing: the numbers, and all answers side by side.

In: a `RefusalReport`. Out: text. Everything that a file or a model said is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from ollama_forge.dataset.verdicts import Kind, Tally, wilson_interval
from ollama_forge.jobs.refusals import HARMFUL, HARMLESS, JudgedAnswer, ModelRefusals, RefusalReport

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;width:100%}td,th{border:1px solid #ccc;padding:.35rem .6rem;"
    "text-align:left;vertical-align:top}td.text{white-space:pre-wrap;overflow-wrap:anywhere}"
    "td.number{text-align:right;white-space:nowrap}"
    ".refused{background:#fdecea}.degenerate{background:#fff4d6}.answered{background:#eef7ee}"
    ".tag{font-size:.8em;color:#555}.warning{background:#fff4d6;padding:.5rem .8rem;margin:.4rem 0}"
)
_LEGEND = (
    "<b class='answered'>answered</b>, <b class='refused'>refused</b> (with the words that refuse), "
    "<b class='degenerate'>broken</b> (empty, a loop, gibberish, or endless thoughts; never counted as a success)."
)


def render_report(report: RefusalReport) -> str:
    """The page."""
    title = f"Refusals of {report.this.ref}"
    sides = [side for side in (report.this, report.against) if side]
    warnings = "".join(f"<p class='warning'>{html.escape(text)}</p>" for text in report.warnings)
    parts = "".join(
        f"<h2>{words}</h2>{''.join(_answers(sides, part))}"
        for part, words in ((HARMFUL, "Harmful prompts"), (HARMLESS, "Harmless prompts"))
        if _items(report.this, part)
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"<p>Greedy answers of at most {report.max_tokens} tokens, markers: {html.escape(report.markers)}. "
        "Intervals are Wilson's, 95 %. Phrases are a crude judge: read the answers.</p>\n"
        f"{warnings}{''.join(_rates(sides))}{_shift(report)}<p>{_LEGEND}</p>\n{parts}</body></html>\n"
    )


def _items(side: ModelRefusals, part: str) -> tuple[JudgedAnswer, ...]:
    return side.harmful if part == HARMFUL else side.harmless


def _rates(sides: Sequence[ModelRefusals]) -> Iterator[str]:
    yield "<table><tr><th>model</th><th>prompts</th><th>asked</th><th>refused</th><th>broken</th><th>answered</th>"
    yield "<th>judge: refused</th><th>judge agrees</th></tr>"
    for side in sides:
        for part in (HARMFUL, HARMLESS):
            tally = side.tally(part)
            if not tally.n:
                continue
            opinion = side.opinions.get(part)
            judged = sum(kind is Kind.REFUSED for kind in opinion.kinds) if opinion else None
            cells = (
                str(tally.n),
                rate_words(tally.refused, tally),
                rate_words(tally.degenerate, tally),
                str(tally.answered),
                "" if judged is None else str(judged),
                "" if opinion is None else f"{opinion.agreement:.0%}",
            )
            numbers = "".join(f"<td class='number'>{cell}</td>" for cell in cells)
            yield f"<tr><td>{html.escape(side.ref)}</td><td>{part}</td>{numbers}</tr>"
    yield "</table>\n"


def rate_words(count: int, tally: Tally) -> str:
    """`3 of 100 (3.0 %, 1.0 to 8.5)`."""
    low, high = wilson_interval(count, tally.n)
    return f"{count} of {tally.n} ({100 * count / max(1, tally.n):.1f} %, {100 * low:.1f} to {100 * high:.1f})"


def _shift(report: RefusalReport) -> str:
    shift = report.shift
    if shift is None or report.against is None:
        return ""
    rows = {
        "first token, mean": f"{shift.first_kl:.5f} nats (largest {shift.first_kl_max:.4f})",
        "all tokens, mean": f"{shift.answer_kl:.5f} nats (99 % below {shift.answer_kl_p99:.4f})",
        "same most likely token": f"{shift.same_top:.2%}",
        "perplexity of these answers": f"{shift.perplexity_against:.4f} before, {shift.perplexity_this:.4f} now",
        "perplexity of a text": f"{shift.text_perplexity_against:.4f} before, {shift.text_perplexity_this:.4f} now",
    }
    cells = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows.items())
    ref = html.escape(report.against.ref)
    return (
        f"<h2>Harmless answers: how far they moved</h2><p>Divergence KL({ref} || this model) over the {shift.answers} "
        f"answers of {ref}, {shift.tokens} tokens.</p><table>{cells}</table>\n"
    )


def _answers(sides: Sequence[ModelRefusals], part: str) -> Iterator[str]:
    heads = "".join(f"<th>{html.escape(side.ref)}</th>" for side in sides)
    yield f"<table><tr><th>#</th><th>prompt</th>{heads}</tr>"
    for number, items in enumerate(zip(*(_items(side, part) for side in sides), strict=True), start=1):
        prompt = html.escape(items[0].answer.prompt)
        cells = "".join(_cell(item) for item in items)
        yield f"<tr><td>{number}</td><td class='text'>{prompt}</td>{cells}</tr>\n"
    yield "</table>\n"


def _cell(item: JudgedAnswer) -> str:
    kind = item.verdict.kind.value
    notes = [f"{kind}: {item.verdict.evidence}" if item.verdict.evidence else kind]
    notes += [f"judge: {item.opinion.value}"] if item.opinion else []
    notes += [] if item.answer.stopped else ["cut"]
    tag = html.escape("; ".join(notes))
    return f"<td class='text {kind}'>{html.escape(item.answer.text)}<div class='tag'>{tag}</div></td>"
