"""The shipped model keeps what its README promises, through the project's own converter and llama.cpp."""

from __future__ import annotations

import json
import random
from pathlib import Path

import learnt_model as world
import pytest

from ollama_forge.jobs.conversion import convert_folder, convert_options, quantize_options

LIMIT_BYTES = 3_000_000


def convert(output: Path, quant: str | None = None) -> Path:
    options = convert_options("bf16", quantize_options(quant) if quant else None)
    return convert_folder(world.MODEL_DIR, output, options).output


@pytest.mark.parametrize("quant", [None, "Q8_0", "Q4_K_M"])
def test_the_model_answers_held_out_questions_of_every_kind(tmp_path: Path, quant: str | None) -> None:
    model = convert(tmp_path / "model.gguf", quant)

    scores = world.score_engine(model, world.held_out())

    assert {score.kind: score.rate for score in scores.values() if score.rate < 0.95} == {}


def test_new_robots_are_unknown_before_fine_tuning(tmp_path: Path) -> None:
    model = convert(tmp_path / "model.gguf")

    answers = world.engine_answers(model, world.held_out_new_facts())

    assert sum(answer == world.UNKNOWN for answer in answers) >= 0.8 * len(answers)


def test_training_never_draws_a_held_out_question_or_a_reserved_name() -> None:
    draw = random.Random(3)
    plain = {e.question for e in world.held_out() if e.system is None and e.kind not in ("small talk", "unknown")}
    last_wordings = {wordings[-1] for wordings in world.MANNERS.values()}
    drawn = [world.training_conversation(draw) for _ in range(20_000)]
    asked = {turn["content"] for messages in drawn for turn in messages if turn["role"] == "user"}
    systems = {turn["content"] for messages in drawn for turn in messages if turn["role"] == "system"}

    assert asked.isdisjoint(plain)
    assert not [system for system in systems if any(wording in system for wording in last_wordings)]
    assert not [
        question for question in asked if any(name in question.split("?")[0].split() for name in world.NEW_ROBOTS)
    ]


def test_the_demos_files_say_what_the_rules_say() -> None:
    assert (world.DEMO_DIR / "finetune.jsonl").read_text("utf-8") == world.render_finetune_jsonl()
    assert (world.DEMO_DIR / "questions.txt").read_text("utf-8") == world.render_questions()
    taught = [json.loads(line)["messages"] for line in world.render_finetune_jsonl().splitlines()]
    asked = {messages[0]["content"] for messages in taught}
    assert len(taught) == 50
    assert asked.isdisjoint(example.question for example in world.held_out_new_facts())


def test_the_shipped_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in world.MODEL_DIR.iterdir()) <= LIMIT_BYTES
