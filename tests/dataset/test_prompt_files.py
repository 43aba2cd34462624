"""Lists of prompts: text and JSON lines, folders of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ollama_forge.dataset.prompts import read_prompts
from ollama_forge.errors import DatasetError, NotFoundError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_gives_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffHow?\r\n\n  Why not?  \nHow?\nIs \u2028 it?")
    assert read_prompts([path]) == ["How?", "Why not?", "Is \u2028 it?"]


def test_json_lines_give_prompt_or_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "One\\nTwo", "text": "no"}\n\n{"text": " Three "}\n"Four"\n')
    assert read_prompts([path]) == ["One\nTwo", "Three", "Four"]


def test_a_folder_stands_for_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.txt", "last\n")
    write(tmp_path / "d" / "a.jsonl", '{"prompt": "first"}')
    write(tmp_path / "d" / "README.md", "not a prompt")
    other = write(tmp_path / "c.txt", "third")
    assert read_prompts([tmp_path / "d", other, other]) == ["first", "last", "third"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", "alone\nalone\n", "holds 1 prompt"),
        ("a.txt", b"good\nbad \xff\n", "byte 0xff in line 2"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "y"}', "Line 2"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "Line 2"),
        ("a.jsonl", '{"prompt": 3}', "Line 1"),
        ("a.jsonl", '{"prompt": " "}', "Line 1"),
        ("a.csv", "prompt\nx\ny\n", "neither .txt nor .jsonl"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DatasetError) as caught:
        read_prompts([path])
    assert words in caught.value.what and str(path) in caught.value.what and caught.value.next


def test_missing_paths_and_folders_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_prompts([tmp_path / "none.txt"])
    with pytest.raises(DatasetError, match=r"No \.txt"):
        read_prompts([tmp_path])
    with pytest.raises(DatasetError, match="No prompts"):
        read_prompts([])


def test_a_single_prompt_is_enough_where_it_is_asked_for(tmp_path: Path) -> None:
    assert read_prompts([write(tmp_path / "a.txt", "alone")], at_least=1) == ["alone"]
