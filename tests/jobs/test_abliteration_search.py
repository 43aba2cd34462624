"""`abliterate optimize` on the model that refuses to talk about vegetables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import DEMO_MODEL, forge, forge_json
from learnt_model import HOUSE_THINGS, VEGETABLES, trained_prompts

from ollama_forge.dataset.verdicts import Tally
from ollama_forge.jobs.ablation_bench import TrialScore
from ollama_forge.jobs.abliteration_search import Trial, dominates, pareto_front

SMALL = ("--num-eval-prompts", "8", "--num-prompts", "6", "--trial-tokens", "12", "--max-tokens", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store (`base`, Q4_K_M) and two lists of prompts."""
    folder = tmp_path_factory.mktemp("place")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder / "s")
    for name, nouns in (("harmful", VEGETABLES), ("harmless", HOUSE_THINGS)):
        (folder / f"{name}.txt").write_text("\n".join(trained_prompts(nouns, 48)) + "\n", encoding="utf-8")
    return folder


def words(place: Path, work: Path, *more: object) -> tuple[object, ...]:
    lists = ("--harmful", place / "harmful.txt", "--harmless", place / "harmless.txt")
    return ("abliterate", "optimize", "--model", "base", *lists, "--output-dir", work, "--store", place / "s", *more)


def study_lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "study.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_dry_run_says_what_a_search_takes(place: Path, tmp_path: Path) -> None:
    only_front = forge_json(*words(place, tmp_path / "w", "--dry-run", "--n-trials", "7"))["plan"]
    picked = forge_json(*words(place, tmp_path / "w", "--dry-run", "--pick", "best", "--name", "new"))["plan"]
    assert only_front["trials"] == 7 and only_front["memory_bytes"] > only_front["source_bytes"] > 0
    assert only_front["disk_bytes"] < picked["disk_bytes"] >= 2 * picked["source_bytes"]
    told = forge(*words(place, tmp_path / "w", "--dry-run"))
    assert "prompts to compute" in told.out and "of memory and" in told.out and "60 trials" in told.out
    assert not (tmp_path / "w").exists()


def test_forty_trials_find_what_is_better_than_the_default_and_the_pick_is_landed(place: Path) -> None:
    command = words(place, place / "search", *SMALL, "--n-trials", 40)
    found = forge_json(*command)
    default, front = found["default"], found["front"]
    assert found["trials"] == 40 and default["number"] == 0 and found["dominates_default"]
    assert found["untouched"]["refused"] == found["untouched"]["asked"] == 8
    better = [point for point in front if point["refused"] <= default["refused"] and point["kl"] < default["kl"]]
    assert better and all(point["degenerate"] == 0 for point in better)
    assert better[0]["refused"] <= 0.05 * better[0]["asked"] and better[0]["kl"] < 0.1
    command = (*command, "--no-check", "--name", "mine")
    for words_of_it, code in (((), 2), (("--pick", "99"), 1), (("--pick", "some"), 2)):
        assert forge(*command, *words_of_it).code == code
    result = forge_json(*command, "--pick", "best")
    assert result["picked"] == front[0]["number"] and result["front"] == front
    evaluation = result["result"]["evaluation"]
    assert evaluation["against"]["harmful"]["refused"] == 6 and evaluation["this"]["harmful"]["refused"] == 0
    assert result["result"]["landed"]["name"] == "mine:latest"
    lineage = forge_json("registry", "lineage", "mine")
    assert lineage["landing"]["parameters"]["trial"] == result["picked"]


def test_the_same_seed_finds_the_same_and_a_search_goes_on_where_it_ended(place: Path) -> None:
    forge_json(*words(place, place / "whole", *SMALL, "--n-trials", "13"))
    whole = study_lines(place / "whole")
    folder = place / "resumed"
    begun = forge_json(*words(place, folder, *SMALL, "--n-trials", "11"))
    assert not begun["resumed"] and study_lines(folder) == whole[:12]
    further = forge_json(*words(place, folder, *SMALL, "--n-trials", "13"))
    assert (
        further["resumed"] and (folder / "study.jsonl").read_bytes() == (place / "whole" / "study.jsonl").read_bytes()
    )
    stopped = forge_json(*words(place, folder, *SMALL, "--n-trials", "40", "--timeout", "0.001"))
    assert 13 <= stopped["trials"] < 20
    changed = forge(*words(place, folder, *SMALL, "--n-trials", "13", "--seed", "5"))
    assert changed.code == 1 and "something else" in changed.err


def test_a_damaged_study_is_refused_not_overwritten(place: Path, tmp_path: Path) -> None:
    command = words(place, tmp_path / "w", *SMALL, "--n-trials", "1")
    forge_json(*command)
    path = tmp_path / "w" / "study.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "{", encoding="utf-8")
    ended = forge(*command)
    assert ended.code == 1 and "no study" in ended.err and path.read_text(encoding="utf-8").endswith("{")


def test_options_of_old_say_what_to_do_instead(place: Path, tmp_path: Path) -> None:
    for old, value in (("--eval-base-url", "x"), ("--eval-model", "x"), ("--max-parallel", "2")):
        ended = forge(*words(place, tmp_path / "w"), old, value)
        assert ended.code == 2 and "next" in ended.err
    assert not (tmp_path / "w").exists()


def score(bad: int, kl: float, broken: int = 0) -> TrialScore:
    return TrialScore(Tally(10, bad, broken), kl, kl)


def test_the_front_holds_what_nothing_beats() -> None:
    scores = [
        score(5, 0.5),
        score(5, 0.2),
        score(0, 0.4),
        score(0, 0.4),
        score(9, 0.1),
        score(3, 0.4),
        score(0, 0.1, 3),
    ]
    trials = [Trial(number, {}, item) for number, item in enumerate(scores)]
    front = pareto_front(trials)
    assert [trial.number for trial in front] == [2, 6]
    assert not any(dominates(one, other) for one in front for other in front)
    assert all(trial in front or any(not dominates(trial, point) for point in front) for trial in trials)


def test_broken_answers_are_as_bad_as_refusals() -> None:
    assert score(0, 0.1, 4).bad_rate == score(4, 0.1).bad_rate == 0.4
