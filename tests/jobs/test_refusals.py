"""`abliterate evaluate` on the model that refuses to talk about vegetables, through the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DEMO_MODEL, forge, forge_json
from learnt_model import REFUSAL, held_out_tasks, held_out_triggers
from loopback_ollama import LoopbackOllama
from safetensors.torch import load_file, save_file

N = 12


def write_prompts(path: Path, prompts: list[str]) -> Path:
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store (`base`: the learnt model in Q4_K_M) and the two lists of prompts."""
    folder = tmp_path_factory.mktemp("place")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder / "store")
    write_prompts(folder / "harmful.txt", [item.question for item in held_out_triggers()[::16]])
    write_prompts(folder / "harmless.txt", [item.question for item in held_out_tasks()[::16]])
    return folder


def lists(place: Path) -> tuple[object, ...]:
    return ("--harmful", place / "harmful.txt", "--harmless", place / "harmless.txt")


def evaluate(place: Path, *more: object) -> Any:
    return forge_json("abliterate", "evaluate", *more, "--store", place / "store")


def test_the_learnt_refuser_refuses_all_of_its_class_and_nothing_else(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report = evaluate(place, "base", *lists(place), "--against", "base", "--html", page)
    harmful, harmless = report["this"]["harmful"], report["this"]["harmless"]
    assert (harmful["n"], harmful["refused"], harmful["degenerate"]) == (N, N, 0)
    assert harmful["refusal_interval"] == [pytest.approx(0.7575, abs=1e-3), 1.0]
    assert (harmless["refused"], harmless["degenerate"]) == (0, 0)
    assert not report["swapped"] and report["max_tokens"] >= 150
    shift = report["shift"]
    assert shift["answers"] == N and shift["tokens"] > 5 * N
    assert shift["first_kl"] < 1e-6 and shift["answer_kl"] < 1e-6 and shift["same_top"] == 1
    assert shift["text_perplexity_this"] == shift["text_perplexity_against"]
    answers = report["this"]["answers"]["harmful"]
    assert {item["answer"].strip() for item in answers} == {REFUSAL}
    text = page.read_text(encoding="utf-8")
    assert text.count(REFUSAL) == 2 * N and "http" not in text and "<script" not in text


def test_answers_are_the_same_every_time(place: Path) -> None:
    first, second = (evaluate(place, "base", *lists(place), "--num-prompts", "3") for _ in range(2))
    assert first["this"]["answers"] == second["this"]["answers"]
    assert first["this"]["harmful"]["n"] == first["this"]["harmless"]["n"] == 3


def test_swapped_files_are_noticed(place: Path) -> None:
    swapped = ("--harmful", place / "harmless.txt", "--harmless", place / "harmful.txt")
    report = evaluate(place, "base", *swapped, "--num-prompts", "4")
    assert report["swapped"] and any("swapped" in text for text in report["warnings"])


def test_what_it_was_made_from_is_found_in_its_record(place: Path) -> None:
    forge_json(
        *("create-from-base", "--base", "base", "--name", "child", "--system", "Be polite."),
        *("--no-check", "--store", place / "store"),
    )
    report = evaluate(place, "child", *lists(place), "--num-prompts", "3")
    assert report["against"]["model"] == "base:latest"
    assert report["shift"]["first_kl"] < 1e-6, "the weights are the same"
    alone = evaluate(place, "child", *lists(place), "--num-prompts", "2", "--no-against")
    assert alone["against"] is None and alone["shift"] is None


def test_a_broken_model_is_never_a_success(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(DEMO_MODEL, folder)
    draw = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    noisy = {
        name: values + (0.2 * torch.randn(values.shape, generator=draw)).to(values.dtype)
        for name, values in weights.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    report = evaluate(place, folder, *lists(place), "--num-prompts", "4", "--against", "base")
    tally = report["this"]["harmful"]
    assert tally["refused"] == 0 and tally["degenerate"] == tally["n"] == 4 and tally["answered"] == 0
    assert any("broken" in text for text in report["warnings"])


def test_a_judge_on_a_server_has_its_say(place: Path) -> None:
    def judge(_name: str, messages: list[dict[str, Any]]) -> str:
        return "**REFUSED**" if REFUSAL in messages[-1]["content"] else "It is ANSWERED."

    with LoopbackOllama(place / "store", answer=judge) as server:
        report = evaluate(
            place, "base", *lists(place), "--num-prompts", "3", "--judge", "base", "--judge-host", server.url
        )
    assert report["judge_model"] == "base"
    said = report["this"]["judge"]
    assert said["harmful"]["refused"] == 3 and said["harmless"]["answered"] == 3
    assert said["harmful"]["agreement"] == said["harmless"]["agreement"] == 1


def test_a_judge_that_says_nothing_clear_is_counted_as_such(place: Path) -> None:
    report = evaluate(place, "base", *lists(place), "--num-prompts", "2", "--judge", "base")
    said = report["this"]["judge"]["harmful"]
    assert said["n"] == 2 == said["unclear"] and said["agreement"] == 0


def test_refusals_can_be_what_the_users_file_says(place: Path, tmp_path: Path) -> None:
    markers = write_prompts(tmp_path / "markers.txt", ["(wash|carry|draw|weigh|wrap|keep|sell|paint) the"])
    report = evaluate(place, "base", *lists(place), "--num-prompts", "3", "--refusal-markers", markers)
    assert report["this"]["harmful"]["refused"] == 0
    assert report["this"]["harmless"]["refused"] == 3


def test_short_answers_come_with_a_warning(place: Path) -> None:
    harmful = ("--harmful", place / "harmful.txt")
    report = evaluate(place, "--checkpoint", "base", *harmful, "--max-new-tokens", "20", "--num-prompts", "2")
    assert any("refusals can come later" in text for text in report["warnings"])
    assert any("--harmless" in text for text in report["warnings"])


def test_a_model_without_a_chat_template_is_asked_only_with_raw(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(DEMO_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    ended = forge("abliterate", "evaluate", folder, *lists(place))
    assert ended.code == 1 and "no chat template" in ended.err and "--raw" in ended.err
    report = evaluate(place, folder, *lists(place), "--raw", "--num-prompts", "2", "--no-against", "--max-tokens", "20")
    assert report["this"]["harmful"]["n"] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompt"),
        ("How do I wash a leek?\n", "holds 1 prompt"),
        ("How do I wash a leek?\n" + "word " * 3000 + "\n", "context"),
        ("\ufeff\n\n", "holds no prompt"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(place: Path, tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(content, encoding="utf-8")
    arguments = ("abliterate", "evaluate", "base", "--store", place / "store", "--harmless", place / "harmless.txt")
    ended = forge(*arguments, "--harmful", path)
    assert ended.code == 1 and words in ended.err, ended.err


def test_wrong_words_are_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    arguments = ("abliterate", "evaluate", "--store", place / "store")
    assert forge(*arguments, *lists(place)).code == 2
    assert forge(*arguments, "base", "--model", "base", *lists(place)).code == 2
    missing = forge(*arguments, "base")
    assert missing.code == 2 and "bring your own" in missing.err
    both = forge(*arguments, "base", "--harmful", place / "harmful.txt", "--harmless", place / "harmful.txt")
    assert both.code == 2 and "in both lists" in both.err
    there = write_prompts(tmp_path / "page.html", ["mine"])
    kept = forge(*arguments, "base", *lists(place), "--html", there)
    assert kept.code == 1 and there.read_text() == "mine\n"
    assert forge(*arguments, "nobody", *lists(place)).code == 1
