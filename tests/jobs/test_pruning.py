"""`downsize prune` on a model that has learnt something: chosen layers beat random ones, and the result is whole."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from command import forge, forge_json, tree_hash
from deep_model import N_LAYERS, SELDOM, conversations, deep_model
from kill import count_events, run_and_kill
from learnt_model import MODEL_DIR, training_conversation
from projectors import land_with_projector

from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.jobs.calibration import measure_ranking, read_rows
from ollama_forge.jobs.pruning_request import CalibrationOptions
from ollama_forge.store.catalog import open_store
from ollama_forge.train.load import load_packed
from ollama_forge.transform.cut import Cut, read_sizes
from ollama_forge.transform.prune import plan_gguf_cut
from ollama_forge.transform.ranking import Target, choose_cut, choose_layers, dropped_layers, random_layers
from ollama_forge.weights.checkpoint import open_checkpoint

N_KEPT = N_LAYERS - len(SELDOM)
SEEDS = range(5)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deep learnt model as a GGUF."""
    folder = deep_model(tmp_path_factory)
    out = tmp_path_factory.mktemp("deep") / "deep.gguf"
    forge_json("convert", folder, "-o", out, "--outtype", "bf16")
    return out


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of its world to measure with."""
    draw = random.Random("calibration")
    out = tmp_path_factory.mktemp("text") / "spoken.jsonl"
    lines = [json.dumps({"messages": training_conversation(draw)}) for _ in range(60)]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def perplexity(path: Path) -> float:
    """On conversations that nothing was measured with."""
    torch.set_num_threads(1)
    model = load_packed(path).model
    loss, count = 0.0, 0
    with torch.no_grad():
        for row in conversations(7, 40):
            ids = torch.tensor([row])
            loss += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
            count += len(row) - 1
    return math.exp(loss / count)


def cut_model(source: Path, cut: Cut, out: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        plan = plan_gguf_cut(checkpoint, cut)
        with atomic_output(out) as sink:
            write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)
    return out


def test_layers_chosen_by_importance_leave_a_better_model_than_layers_chosen_by_chance(
    deep: Path, spoken: Path, tmp_path: Path
) -> None:
    with open_gguf(deep) as gguf:
        importance = measure_ranking(gguf, CalibrationOptions(text=spoken))
    kept = choose_layers(importance, N_KEPT)
    assert dropped_layers(N_LAYERS, kept) == list(SELDOM)
    chosen = perplexity(cut_model(deep, Cut(layers=kept), tmp_path / "chosen.gguf"))
    for seed in SEEDS:
        at_random = Cut(layers=random_layers(N_LAYERS, N_KEPT, seed))
        assert chosen < perplexity(cut_model(deep, at_random, tmp_path / f"{seed}.gguf"))


@pytest.mark.parametrize(("part", "total", "kept"), [("ffn", 256, 128), ("kv_heads", 2, 1)])
def test_channels_and_heads_chosen_by_importance_leave_a_better_model_than_those_chosen_by_chance(
    spoken: Path, tmp_path: Path, part: str, total: int, kept: int
) -> None:
    whole = tmp_path / "whole.gguf"
    forge_json("convert", MODEL_DIR, "-o", whole)
    with open_gguf(whole) as gguf:
        importance = measure_ranking(gguf, CalibrationOptions(text=spoken), [part])
    with open_checkpoint(whole) as checkpoint:
        sizes = read_sizes(checkpoint)
    target = Target(ffn=kept) if part == "ffn" else Target(n_kv_heads=kept)
    cut = choose_cut(importance, sizes, target)
    chosen = perplexity(cut_model(whole, cut, tmp_path / "chosen.gguf"))
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        rows = np.stack([np.sort(draw.choice(total, kept, replace=False)) for _ in range(sizes.n_layers)])
        if np.array_equal(rows, getattr(cut, part)):
            continue  # of eight ways to keep one of two heads in three layers, chance finds the same one
        at_random = Cut(ffn=rows) if part == "ffn" else Cut(kv_heads=rows)
        assert chosen < perplexity(cut_model(whole, at_random, tmp_path / f"{seed}.gguf"))


def test_a_dry_run_tells_ranking_and_exact_size_and_the_run_keeps_its_word(
    deep: Path, spoken: Path, tmp_path: Path
) -> None:
    before = tree_hash(tmp_path)
    words = ("downsize", "prune", deep, "--keep", "75%", "--text", spoken, "-o", tmp_path / "small.gguf")
    told = forge_json(*words, "--dry-run")
    assert tree_hash(tmp_path) == before and told["dry_run"]
    assert len(told["ranking"]["layers"]) == N_LAYERS and told["sizes"]["layers"] < N_LAYERS
    done = forge_json(*words)
    assert done["bytes"] == told["bytes"] == (tmp_path / "small.gguf").stat().st_size
    assert done["dropped_layers"] == told["dropped_layers"]
    assert done["requantized"] == done["sliced"] == 0
    with open_engine(tmp_path / "small.gguf", context_length=256) as engine:
        assert engine.generate("The", Sampling(temperature=0.0, seed=0, max_tokens=4)).n_tokens


def test_the_same_command_gives_the_same_bytes(deep: Path, tmp_path: Path) -> None:
    words = ("downsize", "prune", deep, "--width", "ffn=50%,heads=50%", "--tokens", 600)
    first = forge_json(*words, "-o", tmp_path / "one.gguf")
    forge_json(*words, "-o", tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert first["bytes"] == (tmp_path / "two.gguf").stat().st_size
    assert first["sizes"]["ffn"] == 64 and first["sizes"]["heads"] == 2


def test_a_folder_becomes_a_smaller_folder_or_a_smaller_gguf(tmp_path: Path) -> None:
    for output in ("small", "small.gguf"):
        words = ("downsize", "prune", MODEL_DIR, "--layers", 2, "-o", tmp_path / "new" / output, "--tokens", 300)
        assert forge_json(*words, "--dry-run")["dry_run"]
        assert not (tmp_path / "new").exists()
        done = forge_json("downsize", "prune", MODEL_DIR, "--layers", 2, "-o", tmp_path / output, "--tokens", 300)
        assert done["sizes"]["layers"] == 2
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"small", "small.gguf"}
    forge_json("convert", tmp_path / "small", "-o", tmp_path / "again.gguf")
    with open_gguf(tmp_path / "again.gguf") as again, open_gguf(tmp_path / "small.gguf") as small:
        assert {n: bytes(again.read(n)) for n in again.tensors} == {n: bytes(small.read(n)) for n in small.tensors}


def test_a_pruned_model_lands_with_what_its_source_says_and_with_its_lineage(tmp_path: Path) -> None:
    store = tmp_path / "models"
    forge_json("import", MODEL_DIR, "--name", "whole", "--store", store, "--quant", "Q8_0", "--system", "Be brief.")
    words = ("downsize", "prune", "whole", "--drop-layers", "1", "--name", "pruned-for-lineage", "--store", store)
    landed = forge_json(*words, "--temperature", "0.5")
    assert landed["name"] == "pruned-for-lineage:latest" and landed["pruned"]["dropped_layers"] == [1]
    assert forge_json("show", "pruned-for-lineage", "--store", store)["system"] == "Be brief."
    lineage = forge("registry", "lineage", "pruned-for-lineage")
    assert lineage.code == 0 and "prune" in lineage.out and "whole" in lineage.out


@pytest.mark.parametrize("words", [("--layers", 2), ("--width", "ffn=51.5%,heads=50%")])
def test_a_pruned_model_is_made_again_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    forge_json("import", MODEL_DIR, "--name", "whole", "--quant", "Q8_0", "--no-check")
    more = ("--tokens", 300, "--system", "Be brief.", "--no-check")
    forge_json("downsize", "prune", "whole", *words, "--name", "small", *more)
    assert forge_json("registry", "rebuild", "small")["same"] is True


def test_a_picture_of_the_ranking_is_drawn(deep: Path, tmp_path: Path) -> None:
    words = ("downsize", "prune", deep, "--keep", "80%", "--dry-run", "--tokens", 300, "--plot")
    forge_json(*words, tmp_path / "ranking.html")
    forge_json(*words, tmp_path / "ranking.png")
    page = (tmp_path / "ranking.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    refused = forge(*words, tmp_path / "ranking.png", "--json")
    assert refused.document["error"]["kind"] == "exists"


def test_a_cut_inside_of_layers_tells_what_it_keeps(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    forge_json("convert", MODEL_DIR, "-o", whole)
    words = ("downsize", "prune", whole, "--width", "ffn=50%,heads=50%,hidden=75%", "--tokens", 300, "--dry-run")
    told = forge_json(*words, "--plot", tmp_path / "cut.png")
    ranking = told["ranking"]
    assert (ranking["ffn"]["count"], ranking["ffn"]["kept"]) == (256, 128)
    assert all(0.5 < row["kept_share"] < 1 for row in ranking["ffn"]["layers"])
    for row in ranking["kv_heads"]["layers"]:
        assert row["kept"] == [int(np.argmax(row["importance"]))] and len(row["importance"]) == 2
        assert row["kept_share"] == pytest.approx(max(row["importance"]) / sum(row["importance"]))
    assert 0.75 < ranking["hidden"]["kept_share"] < 1 and (tmp_path / "cut.png").is_file()
    seen = forge(*words).out
    assert "INFLUENCE" not in seen and "Hidden channels: 192 of 256 stay" in seen
    assert "FFN 128/256" in seen and "KV GROUPS 1/2" in seen
    assert seen.count(" cut") == len(ranking["kv_heads"]["layers"])


def test_people_see_the_ranking_and_the_limits(deep: Path) -> None:
    ended = forge("downsize", "prune", deep, "--layers", 4, "--tokens", 300, "--dry-run")
    assert ended.code == 0 and "INFLUENCE" in ended.out and "Nothing was changed" in ended.out
    assert "at most a third" in ended.err and "lower quantization" in ended.err


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ((), "usage"),
        (("--layers", "0"), "usage"),
        (("--layers", str(N_LAYERS)), "usage"),
        (("--layers", "99"), "usage"),
        (("--keep", "1%"), "usage"),
        (("--keep", "all"), "usage"),
        (("--keep", "50%", "--layers", "3"), "usage"),
        (("--width", "heads=3"), "usage"),
        (("--width", "experts=2"), "usage"),
        (("--drop-layers", "3-99"), "usage"),
        (("--drop-layers", "0-9"), "usage"),
        (("--text", "/no/such/file", "--layers", "3"), "not_found"),
        (("--layers", "3", "--plot", "x.gif"), "usage"),
        (("--drop-layers", "3", "--plot", "x.png"), "usage"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_written(
    deep: Path, tmp_path: Path, words: tuple[str, ...], kind: str
) -> None:
    ended = forge("downsize", "prune", deep, "-o", tmp_path / "small.gguf", *words, "--json")
    assert ended.code != 0 and ended.document["error"]["kind"] == kind, ended.out
    assert not list(tmp_path.iterdir())


def test_a_model_is_never_cut_in_place(deep: Path) -> None:
    ended = forge("downsize", "prune", deep, "--drop-layers", "2", "-o", deep, "--force", "--json")
    assert ended.document["error"]["kind"] == "exists"


def test_killed_anywhere_it_leaves_the_old_file_or_the_whole_new_one(deep: Path, tmp_path: Path) -> None:
    argv = ["-m", "ollama_forge", "downsize", "prune", str(deep), "--drop-layers", "2,5", "-o"]
    whole = tmp_path / "whole.gguf"
    total = count_events([*argv, str(whole)], [tmp_path])
    expected = whole.read_bytes()
    target = tmp_path / "small.gguf"
    for number in {1, 2, total // 3, total // 2, total - 2, total - 1, total}:
        outcome = run_and_kill([*argv, str(target)], number, [tmp_path])
        assert outcome.was_killed
        assert not target.exists() or target.read_bytes() == expected
        target.unlink(missing_ok=True)
    assert forge(*argv[2:], target).code == 0
    assert target.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "small.gguf"}


def test_long_texts_are_drawn_from_by_the_seed(deep: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"The robot {number} makes {number * 7} chairs." for number in range(900)), "utf-8")
    with open_gguf(deep) as gguf:
        drawn = [
            [list(row) for row in read_rows(gguf, CalibrationOptions(text, n_tokens=600, context=100, seed=seed))]
            for seed in (0, 0, 1)
        ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(map(len, drawn[0])) <= 600


def test_a_projector_stays_and_what_it_writes_into_is_not_cut(deep: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    projector = land_with_projector(deep, "sees", store, tmp_path)
    landing = ("--store", store, "--no-check")
    prune = ("downsize", "prune", "sees", "--drop-layers", "1")
    forge_json(*prune, "--name", "short", *landing)
    forge_json(*prune, "-o", tmp_path / "short.gguf", "--name", "short-too", *landing)
    for name in ("short", "short-too"):
        kept = open_store(store).find(name).projector
        assert kept is not None and kept.read_bytes() == projector
        assert forge_json("registry", "rebuild", name)["same"] is True
    narrow = ("downsize", "prune", "sees", "--width", "hidden=75%", "--tokens", 300, "--name", "narrow", *landing)
    ended = forge(*narrow)
    assert ended.code == 1 and "its projector feeds pictures into them" in ended.err
