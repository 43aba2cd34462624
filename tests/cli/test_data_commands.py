"""The commands for training data, as a person or a script runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json

GOOD = '{"instruction": "Hi", "output": "Hello."}\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    assert forge("train-data", "init", "-o", folder).code == 0
    return folder


def test_good_data_is_ok(data: Path) -> None:
    ended = forge("validate-training-data", data)
    assert (ended.code, ended.out) == (0, "OK: 3 valid line(s)\n")
    assert forge_json("validate-training-data", data / "sample.jsonl")["valid"] == 3


def test_bad_lines_are_named_by_number_and_end_with_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD + "oops\n" + '{"instruction": 1}\n' + GOOD)
    ended = forge("validate-training-data", path)
    assert ended.code == 1
    assert f"{path}:2: not JSON" in ended.out and f"{path}:3: 'output' is missing" in ended.out
    assert "2 invalid line(s), 2 valid line(s)" in ended.out
    short = forge("validate-training-data", path, "--max-errors", "1")
    assert f"{path}:3" not in short.out and "... and 1 more" in short.out
    as_json = forge("validate-training-data", path, "--json")
    assert as_json.code == 1
    assert [error["line"] for error in as_json.document["errors"]] == [2, 3]


def test_warnings_are_counted_on_stderr_and_leave_the_data_valid(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "Hi", "output": ""}\n' * 3)
    ended = forge("validate-training-data", path)
    assert ended.code == 0 and "3 with a warning (empty answer)" in ended.err


def test_no_data_and_empty_data_say_what_to_do(tmp_path: Path) -> None:
    assert forge("validate-training-data").code == 2
    missing = forge("validate-training-data", tmp_path / "none")
    assert missing.code == 1 and "none" in missing.err
    nothing_inside = forge("validate-training-data", tmp_path)
    assert nothing_inside.code == 1 and "No .jsonl files" in nothing_inside.err and "--include" in nothing_inside.err
    (tmp_path / "empty.jsonl").write_text("\n\n")
    empty = forge("validate-training-data", tmp_path)
    assert empty.code == 1 and "No training example" in empty.out
    assert forge("validate-training-data", "--schema").out.startswith("One JSON object per line")


def test_prepare_writes_blocks_and_names_the_next_command(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "train_prepared.txt"
    ended = forge("prepare-training-data", data, "-o", out)
    assert ended.code == 0
    assert f"Wrote {out} ({out.stat().st_size:,} bytes, 3 samples, llama.cpp)" in ended.out
    assert "Prepared 3 samples. Next: run your trainer" in ended.out and "train-run" in ended.out
    assert out.read_text().startswith("### Instruction:\nWhat is your name?\n\n### Input:\n(none)\n\n### Response:\n")
    again = forge("prepare-training-data", data, "-o", out)
    assert again.code == 1 and "--force" in again.err
    assert forge("prepare-training-data", data, "-o", out, "--force", "--format", "alpaca").code == 0
    assert json.loads(out.read_text().splitlines()[0])["input"] == ""


def test_prepare_lists_formats_alone_and_refuses_unknown_ones(data: Path, tmp_path: Path) -> None:
    listed = forge("prepare-training-data", "--list-formats")
    assert listed.code == 0 and all(name in listed.out for name in ("llama.cpp", "axolotl", "unsloth", "chatml"))
    assert forge_json("prepare-training-data", "--list-formats")["formats"][0]["name"] == "llama.cpp"
    unknown = forge("prepare-training-data", data, "-o", tmp_path / "x", "--format", "sharegpt")
    assert unknown.code == 2 and "'sharegpt'" in unknown.err
    assert forge("prepare-training-data", data).code == 2
    assert forge("prepare-training-data", "-o", tmp_path / "x").code == 2


def test_several_formats_and_a_dry_run(data: Path, tmp_path: Path) -> None:
    words = ("prepare-training-data", data, "-o", tmp_path / "p.txt", "--format", "llama.cpp,unsloth")
    planned = forge_json(*words, "--dry-run")
    assert planned["dry_run"] and not (tmp_path / "p.llama.cpp.txt").exists()
    written = forge_json(*words)
    assert [(row["path"], row["bytes"]) for row in written["written"]] == [
        (row["path"], row["bytes"]) for row in planned["written"]
    ]


def test_convert_goes_both_ways_and_counts_what_is_lost(tmp_path: Path) -> None:
    chats = tmp_path / "chats"
    assert forge("train-data", "init", "--out", chats, "--template", "chat").code == 0
    source, alpaca, back = chats / "sample.jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lossy = forge("convert-training-data-format", source, "-o", alpaca)
    assert lossy.code == 0 and "1 examples: had earlier turns" in lossy.err and "system prompt" in lossy.err
    kept = forge("convert-training-data-format", source, "-o", alpaca, "--keep-history", "--force")
    assert kept.code == 0 and "earlier" not in kept.err
    assert forge("convert-training-data-format", alpaca, "-o", back, "--to", "messages").code == 0
    assert [json.loads(line) for line in back.read_text().splitlines()] == [
        json.loads(line) for line in source.read_text().splitlines()
    ]
    assert forge("convert-training-data-format", source).code == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text(GOOD + "oops\n")
    refused = forge("convert-training-data-format", bad, "-o", tmp_path / "c.jsonl")
    assert refused.code == 1 and "bad.jsonl:2" in refused.err and not (tmp_path / "c.jsonl").exists()
    assert forge("convert-training-data-format", bad, "-o", tmp_path / "c.jsonl", "--skip-invalid").code == 0


def test_init_never_overwrites(data: Path) -> None:
    before = (data / "sample.jsonl").read_bytes()
    again = forge("train-data", "init", "--output", data, "--template", "chat")
    assert again.code == 1 and "exists already" in again.err
    assert (data / "sample.jsonl").read_bytes() == before


def test_init_says_beforehand_what_it_would_write(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    planned = forge_json("train-data", "init", "-o", folder, "--dry-run")
    assert not folder.exists()
    assert forge_json("train-data", "init", "-o", folder)["written"] == planned["written"]


def test_stats_show_lengths_leaks_secrets_and_one_example_with_its_mask(data: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text((data / "sample.jsonl").read_text().splitlines()[0] + "\n")
    with (data / "more.jsonl").open("w") as stream:
        stream.write('{"instruction": "Mail?", "output": "anna.berg@example.org"}\n' + GOOD + GOOD)
    words = ("train-data", "stats", data, "--base", DEMO_MODEL, "--max-length", "40", "--validation", held)
    ended = forge(*words, "--show-private")
    assert ended.code == 0, ended.err
    assert "6 examples, 12 turns" in ended.out
    assert "1  duplicates" in ended.out and "1  validation examples that are trained on too" in ended.out
    assert "1  e-mail" in ended.out and "anna.berg" not in ended.out
    assert "longer than 40 tokens" in ended.out
    assert "«" in ended.out and "»" in ended.out
    seen = forge_json(*words)
    assert seen["leaks"] == 1 and seen["private"] == {"e-mail": 1}
    assert seen["tokens"] > seen["learnt_tokens"] > 0
    assert len(seen["sample"]["input_ids"]) == len(seen["sample"]["labels"])


def test_stats_refuse_a_base_that_is_not_there(data: Path, tmp_path: Path) -> None:
    ended = forge("train-data", "stats", data, "--base", tmp_path / "none.gguf")
    assert ended.code == 1 and "none.gguf" in ended.err
    assert forge("train-data", "stats", data).code == 2
