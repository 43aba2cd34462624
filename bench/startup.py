"""What a person waits for before anything happens: a header, a list, a page of help."""

from __future__ import annotations

from pathlib import Path

from harness import Command, Job, Measurement, Row, Workshop, run_once, run_side_by_side, show_seconds

BENCH_DIR = Path(__file__).resolve().parent
VOCABULARY = 150_000
N_MODELS = 80
HEAVY = ("numpy", "torch", "transformers")
MORE_REPEATS = 4
"""These jobs take milliseconds, so they are run this many times as often."""


def measure_header(shop: Workshop) -> list[Row]:
    """Open a GGUF with a large vocabulary, beside gguf-py's reader; timed inside a fresh process, without imports."""
    path = shop.make("vocabulary", "vocabulary.gguf", VOCABULARY)
    script = str(BENCH_DIR / "open_header.py")
    (theirs,) = run_side_by_side([Command("gguf.GGUFReader", shop.python(script, "gguf-py", str(path)))], shop.repeats)
    opening = Command("open_gguf", shop.python(script, "ours", str(path)))
    (ours,) = run_side_by_side([opening], shop.repeats * MORE_REPEATS)
    seconds, peer_seconds = _reported(ours), _reported(theirs)
    cell, peer_cell = (f"{c.label}: {show_seconds(s)}" for c, s in ((ours, seconds), (theirs, peer_seconds)))
    job = f"open the header of a {VOCABULARY:,}-token GGUF"
    return [Row(job, cell, peer_cell, f"{peer_seconds / seconds:.0f}x as fast", "< 50 ms", seconds < 0.05)]


def _reported(measurement: Measurement) -> float:
    reported = sorted(float(run.output.split()[-1]) for run in measurement.runs)
    return reported[len(reported) // 2]


def measure_list(shop: Workshop) -> list[Row]:
    """`list` of many models with real headers; `ollama list` needs its server, so the floor is Python itself."""
    store = shop.make("store", "list-store", N_MODELS)
    ours, floor = run_side_by_side(
        [
            Command("ollama-forge list", shop.forge("list", "--json", "--store", str(store))),
            Command("python -c pass", shop.python("-c", "pass")),
        ],
        shop.repeats * MORE_REPEATS,
    )
    listed = ours.runs[0].output.count('"digest"')
    note = f"{listed} models listed; processor time {show_seconds(ours.cpu_seconds)}"
    return [_waiting(f"`list` of {N_MODELS} models", ours, floor, 0.5, note)]


def measure_help(shop: Workshop) -> list[Row]:
    """`--help`, and what it imports."""
    ours, floor = run_side_by_side(
        [
            Command("ollama-forge --help", shop.forge("--help")),
            Command("python -c pass", shop.python("-c", "pass")),
        ],
        shop.repeats * MORE_REPEATS,
    )
    imported = run_once(Command("imports", shop.python("-X", "importtime", "-m", "ollama_forge", "--help"))).output
    names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in imported.splitlines() if "|" in line}
    heavy = sorted(names.intersection(HEAVY))
    note = f"processor time {show_seconds(ours.cpu_seconds)}"
    held = not heavy
    verdict = Row("imports of `--help`", ", ".join(heavy) or "none of them", ", ".join(HEAVY), "", "none of them", held)
    return [_waiting("`--help`", ours, floor, 0.15, note), verdict]


def _waiting(job: str, ours: Measurement, floor: Measurement, limit: float, note: str) -> Row:
    return Row(
        job,
        f"{show_seconds(ours.seconds)} ({ours.spread})",
        f"{floor.label}: {show_seconds(floor.seconds)}",
        f"{ours.seconds / floor.seconds:.1f}x an empty Python",
        f"< {limit} s",
        ours.seconds < limit,
        note,
    )


JOBS = (
    Job("header", measure_header),
    Job("list", measure_list),
    Job("help", measure_help),
)
