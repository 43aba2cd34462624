"""Prepared files: llama.cpp's exact blocks, lines that other trainers read, every loss counted, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.dataset.formats import FORMATS, line_format, parse_formats
from ollama_forge.dataset.prepare import Preparation, output_paths, prepare_files
from ollama_forge.dataset.starter import write_starter
from ollama_forge.dataset.validate import read_dataset, validate_files
from ollama_forge.errors import DatasetError, ExistsError, UsageError

ALPACA = {"instruction": "Summarize.", "input": "Long text...", "output": "Short."}
BARE = {"instruction": "Hi", "output": "Hello."}
ROUNDS = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
}
ANSWER_FIRST = {"messages": [{"role": "assistant", "content": "Early."}, {"role": "user", "content": "Late?"}]}


def prepare(tmp_path: Path, records: list[Any], names: str, **options: Any) -> tuple[Preparation, list[str]]:
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    done = prepare_files([source], tmp_path / "out.txt", parse_formats(names), **options)
    return done, [item.path.read_text(encoding="utf-8") for item in done.written if item.path.exists()]


def test_llama_cpp_blocks_are_exact(tmp_path: Path) -> None:
    done, [text] = prepare(tmp_path, [ALPACA, BARE], "llama.cpp")
    assert text == (
        "### Instruction:\nSummarize.\n\n### Input:\nLong text...\n\n### Response:\nShort.\n\n"
        "### Instruction:\nHi\n\n### Input:\n(none)\n\n### Response:\nHello.\n"
    )
    written = done.written[0]
    assert (written.n_samples, written.size_bytes, written.losses) == (2, len(text.encode()), {})


def test_a_block_of_messages_holds_the_last_round_with_the_system_prompt_as_input(tmp_path: Path) -> None:
    done, [text] = prepare(tmp_path, [ROUNDS, ANSWER_FIRST], "llama.cpp")
    assert text == "### Instruction:\nTwo?\n\n### Input:\nBe kind.\n\n### Response:\n2\n"
    assert done.written[0].losses == {"earlier turns": 1, "no answer": 1, "system as input": 1}
    assert done.warnings == {"last turn": 1, "order": 1}


def test_every_other_format_is_what_its_tool_reads(tmp_path: Path) -> None:
    done, texts = prepare(tmp_path, [ALPACA, ROUNDS], "axolotl,unsloth,chatml,alpaca,axolotl")
    assert [item.path.name for item in done.written] == [
        f"out.{name}.jsonl" for name in ("axolotl", "unsloth", "chatml", "alpaca")
    ]
    axolotl, unsloth, chatml, alpaca = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert axolotl[1] == ROUNDS and unsloth[1] == {"conversations": ROUNDS["messages"]}
    assert axolotl[0]["messages"][0] == {"role": "user", "content": "Summarize.\n\nLong text..."}
    assert chatml[0]["text"].endswith("<|im_end|>\n<|im_start|>assistant\nShort.<|im_end|>\n")
    assert chatml[1]["text"].count("<|im_start|>") == 5
    assert alpaca == [ALPACA, {"instruction": "Two?", "input": "Be kind.", "output": "2"}]
    assert validate_files([item.path for item in done.written if item.format != "chatml"]).n_valid == 6


def test_what_a_form_cannot_hold_is_counted(tmp_path: Path) -> None:
    rich = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "21.", "reasoning_content": "easy", "weight": 0},
            {"role": "user", "content": "Thanks"},
        ]
    }
    done, _ = prepare(tmp_path, [rich], "llama.cpp,axolotl,unsloth,chatml")
    losses = {item.format: dict(item.losses) for item in done.written}
    assert losses["llama.cpp"] == {"after the answer": 1, "not learnt": 1, "reasoning": 1, "tools": 1}
    assert losses["chatml"] == {"not learnt": 1, "reasoning": 1, "tools": 1}
    assert losses["unsloth"] == {"not learnt": 1} and losses["axolotl"] == {}


def test_one_invalid_line_and_nothing_is_written(tmp_path: Path) -> None:
    bad: list[Any] = [BARE, *([3] * 14), BARE]
    with pytest.raises(DatasetError) as caught:
        prepare(tmp_path, bad, "llama.cpp")
    assert "14 invalid" in caught.value.what and "... and 4 more" in caught.value.why
    assert "d.jsonl:2:" in caught.value.why and "validate-training-data" in caught.value.next
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
    done, [text] = prepare(tmp_path, bad, "llama.cpp", skip_invalid=True)
    assert done.n_skipped == 14 and text.count("### Instruction:") == 2


def test_a_dry_run_measures_exactly_and_writes_nothing(tmp_path: Path) -> None:
    names = ",".join(FORMATS)
    planned, _ = prepare(tmp_path, [ALPACA, ROUNDS], names, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
    done, _ = prepare(tmp_path, [ALPACA, ROUNDS], names)
    assert [item.size_bytes for item in planned.written] == [item.path.stat().st_size for item in done.written]


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("mine")
    for is_dry in (True, False):
        with pytest.raises(ExistsError):
            prepare(tmp_path, [BARE], "llama.cpp", dry_run=is_dry)
    assert (tmp_path / "out.txt").read_text() == "mine"
    assert prepare(tmp_path, [BARE], "llama.cpp", overwrite=True)[1][0].startswith("### Instruction:")


def test_data_without_an_example_is_refused(tmp_path: Path) -> None:
    for records in ([], [ANSWER_FIRST]):
        with pytest.raises(DatasetError, match="No training example"):
            prepare(tmp_path, records, "llama.cpp")
    with pytest.raises(DatasetError, match="No training example"):
        read_dataset([tmp_path / "d.jsonl"][:0])


def test_formats_are_parsed_and_unknown_ones_refused() -> None:
    assert [row.name for row in parse_formats(" llama.cpp, Axolotl,llama.cpp")] == ["llama.cpp", "axolotl"]
    for text in ("", ",", "llama.cpp,sharegpt"):
        with pytest.raises(UsageError):
            parse_formats(text)
    assert output_paths(Path("a/out.txt"), parse_formats("llama.cpp")) == (Path("a/out.txt"),)
    with pytest.raises(UsageError):
        line_format("messages", keep_history=True)
    with pytest.raises(UsageError):
        line_format("sharegpt")


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_starter_is_valid_and_never_overwrites(tmp_path: Path, template: str) -> None:
    folder = tmp_path / "data"
    paths = write_starter(folder, template)
    assert [path.name for path in paths] == ["sample.jsonl", "README.md"]
    report = validate_files([paths[0]])
    assert (report.n_valid, report.n_invalid, report.warnings) == (3, 0, {})
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    with pytest.raises(ExistsError, match=r"sample\.jsonl"):
        write_starter(folder, "alpaca")
    assert paths[0].read_bytes() == before[0] and not paths[1].exists()
    with pytest.raises(UsageError):
        write_starter(tmp_path / "other", "poem")
