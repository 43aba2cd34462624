"""A model made to fit a size: the learnt model of the demo, its real divergences, and sizes that cannot be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash

from ollama_forge.arch.kv_cache import kv_cache_bytes
from ollama_forge.engine import GREEDY, open_engine
from ollama_forge.errors import ExistsError, FormatError, UsageError
from ollama_forge.files import Advance, atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, copy_entry, from_reader, write_gguf
from ollama_forge.jobs.conversion import convert_folder, convert_options, quantize_options
from ollama_forge.jobs.fit_measurements import cut_fit_text
from ollama_forge.jobs.fit_result import OWN, UNCHANGED, Fit, FitRequest, parse_limit
from ollama_forge.jobs.measure import built_in_text
from ollama_forge.jobs.quantize_fit import fit_file
from ollama_forge.train.scored_model import ScoreOptions, scored_model
from ollama_forge.train.scoring import compare

CONTEXT = 256
PASSES = 48
"""Three types of each of the 16 parts."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "model-bf16.gguf"
    convert_folder(DEMO_MODEL, path, convert_options("bf16", None))
    return path


@pytest.fixture(scope="module")
def measured_home(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the model is measured already."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_FORGE_HOME", str(home))
        run(source, home / "first.gguf", limit(source, 840_000))
    return home


@pytest.fixture
def home(measured_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(measured_home))
    return measured_home


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def limit(source: Path, weights_bytes: int) -> int:
    with open_gguf(source) as file:
        return weights_bytes + kv_cache_bytes(file, CONTEXT)


def request(limit_bytes: int) -> FitRequest:
    return FitRequest(limit_bytes, built_in_text(), CONTEXT, PASSES, "cpu")


def run(source: Path, output: Path, limit_bytes: int, *, dry_run: bool = False) -> Fit:
    options = quantize_options("Q4_K_M", n_threads=1)
    return fit_file(source, output, request(limit_bytes), options, dry_run=dry_run)


@pytest.mark.parametrize("weights_bytes", [600_000, 700_000, 840_000, 990_000])
def test_the_result_is_not_worse_than_any_plain_mix_that_fits(
    source: Path, home: Path, tmp_path: Path, weights_bytes: int
) -> None:
    fit = run(source, tmp_path / "out.gguf", limit(source, weights_bytes))
    assert fit.written is not None and fit.kl is not None
    assert fit.written.size_bytes + fit.kv_bytes <= fit.limit_bytes
    assert fit.written.size_bytes == (tmp_path / "out.gguf").stat().st_size
    plain = [point.kl for point in fit.points if point.name != OWN and point.size_bytes <= weights_bytes]
    assert plain
    assert fit.kl <= min(plain)
    assert fit.passes_run <= 1


def test_a_mix_of_its_own_beats_the_plain_ones_clearly(source: Path, home: Path, tmp_path: Path) -> None:
    fit = run(source, tmp_path / "out.gguf", limit(source, 740_000))
    assert fit.chosen == OWN and fit.kl is not None
    assert fit.kl < 0.8 * min(point.kl for point in fit.points if point.name != OWN and point.fits)


def test_the_cost_that_is_told_is_the_written_file_s(source: Path, home: Path, tmp_path: Path) -> None:
    fit = run(source, tmp_path / "out.gguf", limit(source, 840_000))
    with open_gguf(source) as against, open_gguf(tmp_path / "out.gguf") as this:
        windows = cut_fit_text(against, built_in_text(), 1024).judge
        exact = ScoreOptions(is_exact=True, device="cpu")
        with scored_model(this, options=exact) as first, scored_model(against, options=exact) as second:
            real = compare(first, second, windows, n_worst=0)
        types = {name: tensor.type.name for name, tensor in this.tensors.items()}
    assert real.kl.mean == pytest.approx(fit.kl, rel=1e-4)
    chosen = {choice.group: choice.type for choice in fit.choices}
    assert types["token_embd.weight"] == chosen["token_embd"]
    assert all(types[f"blk.{block}.ffn_down.weight"] == chosen[f"blk.{block}.ffn_down"] for block in range(3))


def test_the_result_still_knows_its_facts(source: Path, home: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.gguf", limit(source, 840_000))
    with open_engine(tmp_path / "out.gguf") as engine:
        said = engine.chat([{"role": "user", "content": "What is the capital of Velmora?"}], GREEDY)
    assert said.text.strip() == "The capital of Velmora is Tarnik."


def test_the_same_size_again_gives_the_same_bytes_without_running_the_model(
    source: Path, home: Path, tmp_path: Path
) -> None:
    first = run(source, tmp_path / "a.gguf", limit(source, 840_000))
    again = run(source, tmp_path / "b.gguf", limit(source, 840_000))
    assert first.written is not None and again.written is not None
    assert again.passes_run == 0
    assert again.written.sha256 == first.written.sha256
    assert (again.kl, again.points, again.choices) == (first.kl, first.points, first.choices)


def test_a_larger_size_never_costs_more(source: Path, home: Path, tmp_path: Path) -> None:
    predicted = [
        run(source, tmp_path / f"{size}.gguf", limit(source, size), dry_run=True).predicted_kl
        for size in range(600_000, 1_600_000, 100_000)
    ]
    assert predicted == sorted(predicted, key=lambda cost: -1.0 if cost is None else -cost)
    assert not list(tmp_path.iterdir())


def test_where_the_parts_mislead_a_plain_mix_is_taken_and_told(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "home" / "fit"
    other.mkdir(parents=True)
    (kept,) = (home / "fit").iterdir()
    numbers = json.loads(kept.read_text())
    numbers["search"] = {
        key: (1e-8 if "ffn" in key or "embd" in key else 9.0 if "Q2_K" in key else 3.0 if "Q4_K" in key else 2.0)
        for key in numbers["search"]
    }
    (other / kept.name).write_text(json.dumps(numbers))
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    fit = run(source, tmp_path / "out.gguf", limit(source, 860_000))
    own = next(point for point in fit.points if point.name == OWN)
    assert fit.chosen in ("IQ4_XS", "Q4_K_S", "Q4_K_M") and fit.kl is not None
    assert fit.kl < own.kl
    assert any(fit.chosen in warning and "was taken" in warning for warning in fit.warnings)
    plain = forge_json("quantize", source, "-o", tmp_path / "plain.gguf", "--type", fit.chosen)
    assert fit.written is not None and fit.written.sha256 == plain["sha256"]


def test_an_interrupted_search_goes_on_where_it_was(source: Path, empty_home: Path, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def interrupted(_label: str, _total: int) -> Iterator[Advance]:
        calls = 0

        def advance(_count: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise KeyboardInterrupt

        yield advance

    wanted = request(limit(source, 840_000))
    with pytest.raises(KeyboardInterrupt):
        fit_file(source, tmp_path / "out.gguf", wanted, quantize_options("Q4_K_M"), progress=interrupted)
    plan = run(source, tmp_path / "out.gguf", wanted.limit_bytes, dry_run=True).plan
    assert (plan.passes, plan.passes_missing) == (PASSES, PASSES - 6)
    assert not (tmp_path / "out.gguf").exists()


def test_a_dry_run_says_what_would_be_measured_and_touches_nothing(
    source: Path, empty_home: Path, tmp_path: Path
) -> None:
    before = tree_hash(tmp_path)
    fit = run(source, tmp_path / "out.gguf", limit(source, 840_000), dry_run=True)
    assert (fit.plan.groups, fit.plan.bands, fit.plan.passes_missing, fit.plan.mixes) == (16, 3, PASSES, 12)
    assert fit.plan.tokens_per_pass == 4 * 256
    assert fit.plan.smallest_bytes < 840_000 < fit.plan.source_bytes
    assert (fit.chosen, fit.written, fit.points) == ("", None, ())
    assert tree_hash(tmp_path) == before


def test_a_damaged_record_of_measurements_counts_as_none(source: Path, empty_home: Path, home: Path) -> None:
    (kept,) = (home / "fit").iterdir()
    content = kept.read_bytes()
    try:
        kept.write_bytes(content[:100])
        plan = run(source, home / "never.gguf", limit(source, 840_000), dry_run=True).plan
    finally:
        kept.write_bytes(content)
    assert plan.passes_missing == PASSES


def test_a_size_that_no_mix_meets_is_refused_with_the_one_that_would_do(
    source: Path, empty_home: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        run(source, tmp_path / "out.gguf", limit(source, 300_000))
    enough = parse_limit(caught.value.next.split()[2].rstrip(","))
    run(source, tmp_path / "out.gguf", enough, dry_run=True)
    with pytest.raises(UsageError, match="too small"):
        run(source, tmp_path / "out.gguf", enough - 20_000, dry_run=True)


def test_a_context_larger_than_the_size_is_refused(source: Path, empty_home: Path, tmp_path: Path) -> None:
    wide = replace(request(2_000_000), context=1 << 20)
    with pytest.raises(UsageError, match="too small") as caught:
        fit_file(source, tmp_path / "out.gguf", wide, quantize_options("Q4_K_M"))
    assert "1,048,576 tokens" in caught.value.why


def test_tensors_that_no_text_runs_through_stay_as_they_are(source: Path, empty_home: Path, tmp_path: Path) -> None:
    seeing = tmp_path / "seeing.gguf"
    picture = np.linspace(-1, 1, 64 * 256, dtype="<f4")
    extra = TensorEntry("v.blk.0.attn_q.weight", (64, 256), GGMLType.F32, lambda: [picture.tobytes()])
    with open_gguf(source) as file, atomic_output(seeing) as sink:
        fields = [from_reader(field) for field in file.fields.values()]
        write_gguf(sink, fields, [*(copy_entry(file, name) for name in file.tensors), extra])
    wanted = replace(request(limit(seeing, 590_000)), max_passes=1)
    fit = fit_file(seeing, tmp_path / "out.gguf", wanted, quantize_options("Q4_K_M"))
    assert (fit.plan.passes, fit.plan.bands) == (18, 1)
    assert fit.chosen == OWN
    assert not any(point.fits for point in fit.points if point.name != OWN)
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.read(extra.name).tobytes() == picture.tobytes()
        assert file.tensors["blk.0.attn_q.weight"].type != GGMLType.BF16


def test_a_model_that_fits_stays_as_it_is(source: Path, empty_home: Path, tmp_path: Path) -> None:
    fit = run(source, tmp_path / "out.gguf", 1 << 30)
    assert (fit.chosen, fit.kl, fit.passes_run) == (UNCHANGED, 0.0, 0)
    assert any("nothing was quantized" in warning for warning in fit.warnings)
    with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
        assert list(before.tensors) == list(after.tensors)
        assert all(before.read(name) == after.read(name) for name in before.tensors)
    assert not empty_home.exists()


def test_a_quantized_source_is_refused_unless_it_is_allowed(source: Path, empty_home: Path, tmp_path: Path) -> None:
    forge_json("quantize", source, "-o", tmp_path / "q8.gguf", "--type", "Q8_0")
    with pytest.raises(UsageError, match="quantized already"):
        run(tmp_path / "q8.gguf", tmp_path / "out.gguf", limit(source, 800_000))
    allowed = quantize_options("Q4_K_M", allow_requantize=True)
    fit_file(tmp_path / "q8.gguf", tmp_path / "out.gguf", request(limit(source, 800_000)), allowed, dry_run=True)


def test_the_source_is_never_overwritten(source: Path, empty_home: Path, tmp_path: Path) -> None:
    with pytest.raises(ExistsError):
        run(source, source, limit(source, 800_000))
    with pytest.raises(FormatError, match="the source itself"):
        fit_file(
            source, source, request(limit(source, 800_000)), quantize_options("Q4_K_M"), overwrite=True, dry_run=True
        )


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("5.5GiB", 11 * 2**29),
        ("800M", 8 * 10**8),
        ("1T", 10**12),
        ("123456", 123456),
        ("7kB", 7000),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size_bytes: int) -> None:
    assert parse_limit(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "six", "-6GB", "6XB", "0", "0.0GB", "6GB!", "1e9", "6..5GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_limit(text)


def test_the_command_prints_tables_and_draws(source: Path, home: Path, tmp_path: Path) -> None:
    size = str(limit(source, 840_000))
    words = ["quantize", source, "-o", tmp_path / "o.gguf", "--fit", size, "--context", CONTEXT, "--passes", PASSES]
    ended = forge(*words, "--plot", tmp_path / "fit.html", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "Q4_K_M" in ended.out and "taken" in ended.out and "to compute in" in ended.out
    page = (tmp_path / "fit.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page
    document = forge_json(*words, "--force", "--plot", tmp_path / "fit.png", "--device", "cpu")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert document["fit"]["total_bytes"] == document["bytes"] + document["fit"]["kv_cache_bytes"] <= int(size)
    assert document["fit"]["kl_divergence"] == pytest.approx(
        next(mix["kl"] for mix in document["fit"]["mixes"] if mix["name"] == document["fit"]["chosen"])
    )


def test_an_ollama_model_is_known_by_its_digest(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    forge_json("convert", "--gguf", source, "--name", "big", "--store", store, "--no-check")
    size = str(limit(source, 840_000))
    words = ("quantize", "big", "-o", tmp_path / "o.gguf", "--fit", size, "--context", CONTEXT, "--passes", PASSES)
    plan = forge_json(*words, "--store", store, "--device", "cpu", "--dry-run")["fit"]
    assert plan["plan"]["passes_missing"] == 0
    assert plan["chosen"] == OWN


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs --type TYPE or --fit SIZE"),
        (["--type", "Q4_K_M", "--fit", "1GB"], "--type does not go with --fit"),
        (["--fit", "1GB", "--pure"], "--pure does not go with --fit"),
        (["--fit", "1GB", "--tensor-type", "ffn=q8_0"], "--tensor-type does not go with --fit"),
        (["--type", "Q4_K_M", "--context", "512"], "--context goes with --fit"),
        (["--fit", "6 apples"], "is not a size"),
        (["--fit", "1GB", "--plot", "fit.pdf"], "neither a .png nor an .html"),
    ],
)
def test_options_that_do_not_go_together_are_refused(source: Path, tmp_path: Path, words: list[str], said: str) -> None:
    ended = forge("quantize", source, "-o", tmp_path / "o.gguf", *words)
    assert ended.code == 2
    assert said in ended.err
