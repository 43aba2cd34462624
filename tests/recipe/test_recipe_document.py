"""Recipes as text: every scalar is what was written, every value knows its line, and hostile YAML is refused."""

from __future__ import annotations

import json

import pytest

from ollama_forge.errors import UsageError
from ollama_forge.recipe.document import Document, parse_document
from ollama_forge.recipe.variables import substitute


def parsed(text: str) -> Document:
    document, problems = parse_document(text)
    assert document is not None and not problems, problems
    return document


def test_scalars_stay_the_text_that_was_written() -> None:
    value = parsed("name: no\nrevision: 0123456\nlr: 1e-4\nnum: 12:30\nday: 2026-01-02\nnone:\nquoted: ''\n").value
    assert value == {
        **{"name": "no", "revision": "0123456", "lr": "1e-4", "num": "12:30", "day": "2026-01-02"},
        **{"none": None, "quoted": ""},
    }


def test_every_value_knows_its_line() -> None:
    document = parsed("name: a\nsteps:\n  - quantize:\n      type: Q4_K_M\n  - merge: x\n")
    assert document.line_of(("steps", 0, "quantize", "type")) == 4
    assert document.line_of(("steps", 1, "merge")) == 5
    assert document.line_of(("steps", 1, "merge", "absent")) == 5


def test_json_is_read_with_its_tabs_and_rare_characters() -> None:
    original = {"name": "a", "system": 'tab\there, "quoted", \U0001f600 and ü', "parameters": {"top_k": 5}}
    value = parsed(json.dumps(original, indent="\t")).value
    assert value == {**original, "parameters": {"top_k": "5"}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: a\nbase: b\nname: c\n", 3, "'name' is here twice"),
        ("name: a\nbase: [b\n", 3, "not YAML"),
        ("- name\n", 1, "list of `key: value`"),
        ("", 1, "empty"),
        ("name: !!python/object/apply:os.system [id]\n", 1, "tag"),
        ("name: a\nx: !!binary aGk=\n", 2, "tag"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "Merge keys"),
        ("name: a\n---\nname: b\n", 1, "list of `key: value`"),
        ("? [a, b]\n: c\n", 1, "A key is not a word"),
        ("a: &a [*a]\n", 1, "nested too deeply"),
        ("[" * 2000, 0, ""),
        ('{"a": 1, "a": 2}', 1, "'a' is here twice"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    _, problems = parse_document(text)
    assert problems and (not line or problems[0].line == line) and words in problems[0].what


def test_a_bomb_of_aliases_is_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    document, problems = parse_document("\n".join(lines))
    assert document is None and "too large" in problems[-1].what


def test_variables_come_from_the_recipe_and_from_set_and_may_use_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hf_secret")
    document = parsed(
        "name: ${who}-model\nsystem: You are {{ title }}.\ntemplate: '{{ .Prompt }}{{ who }}'\n"
        "kept: \\${who} \\{{ who }}\nvariables:\n  who: ann\n  title: Captain ${who}\n"
    )
    value, problems = substitute(document, {"who": "bob"})
    assert not problems
    assert value.value["name"] == "bob-model" and value.value["system"] == "You are Captain bob."
    assert value.value["template"] == "{{ .Prompt }}{{ who }}" and value.value["kept"] == "${who} {{ who }}"
    _, problems = substitute(parsed("name: a\nsystem: ${SECRET}\n"), {})
    assert [problem.line for problem in problems] == [2] and "'SECRET'" in problems[0].what


def test_variables_that_need_themselves_or_grow_without_end_are_refused() -> None:
    _, problems = substitute(parsed("name: ${a}\nvariables: {a: '${b}', b: '${a}'}\n"), {})
    assert "needs itself" in problems[0].what
    doubling = ", ".join(f"v{n}: '${{v{n + 1}}}${{v{n + 1}}}'" for n in range(60))
    _, problems = substitute(parsed(f"name: ${{v0}}\nvariables: {{{doubling}, v60: ''}}\n"), {})
    assert not problems
    _, problems = substitute(parsed(f"name: ${{v0}}\nvariables: {{{doubling}, v60: xxxxxxxx}}\n"), {})
    assert any("longer than any recipe needs" in problem.what for problem in problems)


def test_setting_what_is_no_variable_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no such variable") as caught:
        substitute(parsed("name: ${person}\nvariables: {person: x}\n"), {"persn": "y"})
    assert "person" in caught.value.next
