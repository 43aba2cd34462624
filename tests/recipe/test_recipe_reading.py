"""What a recipe may say, and what is said against one: all at once, each with its line and the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.recipe.read import Checked, Recipe, check_recipe
from ollama_forge.recipe.schema import AdapterStep, QuantizeStep


def check(tmp_path: Path, text: str, **settings: str) -> Checked:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return check_recipe(path, settings)


def read(tmp_path: Path, text: str, **settings: str) -> Recipe:
    checked = check(tmp_path, text, **settings)
    assert checked.recipe is not None, [str(problem) for problem in checked.problems]
    return checked.recipe


def test_all_errors_are_found_at_once_each_with_its_line(tmp_path: Path) -> None:
    checked = check(
        tmp_path,
        "name: a b c\n"
        "bsae: llama3.2\n"
        "temperature: warm\n"
        "top_k: 40\n"
        "system: Hi ${who}\n"
        "steps:\n"
        "  - quantise: Q4_K_M\n"
        "  - quantize: Q4_K_X\n"
        "  - finetune: {data: ./absent.jsonl, epochs: many, rank: 0, learning_rate: 1}\n"
        "  - merge\n",
    )
    found = [(problem.line, problem.what, problem.hint) for problem in checked.problems]
    assert checked.recipe is None
    assert [line for line, _, _ in found] == [1, 1, 2, 3, 4, 5, 7, 8, 9, 9, 9, 10]
    by_line = {line: f"{what} {hint}" for line, what, hint in found}
    assert "did you mean 'base'" in by_line[2]
    assert "parameters: {top_k: ...}" in by_line[4]
    assert "There is no variable 'who'" in by_line[5]
    assert "did you mean 'quantize'" in by_line[7]
    assert "There is no file type 'Q4_K_X'" in by_line[8]


def test_wrong_parameters_and_missing_files_are_told_where_they_stand(tmp_path: Path) -> None:
    checked = check(tmp_path, "name: a\nbase: ./absent.gguf\ntemperature: warm\nparameters:\n  num_predict: x\n")
    words = {problem.line: problem.what for problem in checked.problems}
    assert words[2] == "There is no './absent.gguf'" and "num_predict" in words[4]
    checked = check(tmp_path, "name: a\nbase: b\ntemperature: warm\n")
    assert [problem.line for problem in checked.problems] == [3]
    checked = check(tmp_path, "name: a\nbase: b\nlicense: '@LICENCE.txt'\n")
    assert "LICENCE.txt" in checked.problems[0].what and checked.problems[0].line == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: b\n", "'name' is missing"),
        ("name: a\n", "no source"),
        ("name: a\nbase: b\nhf_repo: c/d\n", "2 sources"),
        ("name: a\nbase: b\nrevision: main\n", "'revision' is for hf_repo"),
        ("name: a\nbase: b\nquant: Q4_K_M\n", "'quant' is for hf_repo"),
        ("name: a\nhf_repo: not-a-repo\n", "not a Hugging Face re"),
        ("name: a\nbase: b\nquantize: Q4_0\nsteps: []\n", "stands beside `steps`"),
        ("name: a\nbase: b\nsteps: {quantize: Q4_0}\n", "`steps` is a list"),
        ("name: a\nbase: b\nsteps:\n  - quantize: Q4_0\n    merge: x\n", "A step has one kind"),
        ("name: a\nbase: b\nsteps:\n  - create: {system: x}\n  - quantize: Q4_0\n", "`create` comes last"),
        ("name: a\nbase: b\nsteps:\n  - merge\n", "no adapter to merge"),
        ("name: a\nbase: b\nlicence: x\nlicense: y\n", "mean the same"),
        ("name: a\nbase: b\nmessages:\n  - robot: Hi\n", "messages"),
        ("name: a\nbase: b\nadapter: ./none\n", "There is no './none'"),
        ("name: a\nbase: b\nquantize: Q9\n", "There is no file type 'Q9'"),
        ("name: a:cloud\nbase: b\n", "a:cloud"),
    ],
)
def test_each_mistake_has_its_words(tmp_path: Path, text: str, words: str) -> None:
    checked = check(tmp_path, text)
    assert any(words in f"{problem.what} {problem.hint}" for problem in checked.problems), checked.problems


def test_the_seeds_flat_form_is_steps_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    recipe = read(
        tmp_path,
        f"name: my-model\ncheckpoint: {DEMO_MODEL}\nsystem: Be brief.\ntemperature: 0.7\nnum_ctx: 4096\ntop_p: 0.9\n"
        "repeat_penalty: 1.1\nadapter: lora\nquantize: q4_k_m\n",
    )
    assert [type(step) for step in recipe.steps] == [QuantizeStep, AdapterStep]
    hub = read(tmp_path, "name: m\nhf_repo: org/x-GGUF\nquant: UD-Q4_K_XL\nrevision: v1\ngguf_file: a.gguf\n")
    assert hub.source.repo is not None
    assert (hub.source.repo.revision, hub.source.repo.file, hub.source.repo.quant) == ("v1", "a.gguf", "UD-Q4_K_XL")


def test_variables_may_stand_in_any_value(tmp_path: Path) -> None:
    text = "name: ${n}\nbase: b\ntemperature: ${t}\nvariables: {n: one, t: 0.5}\nsteps: [{quantize: '${q}'}]\n"
    recipe = read(tmp_path, text, q="Q8_0", n="two")
    assert recipe.name == "two" and recipe.wishes[0].temperature == "0.5"
    assert recipe.steps[0].model_dump()["type"] == "Q8_0"


def test_validate_recipe_prints_lines_and_exits_1(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: a\nbsae: b\n")
    ended = forge("validate-recipe", path)
    assert ended.code == 1 and f"{path}:2: There is no key 'bsae' (did you mean 'base'?)" in ended.out
    as_json = forge("validate-recipe", path, "--json")
    assert as_json.code == 1 and not as_json.document["valid"]
    assert [problem["line"] for problem in as_json.document["problems"]] == [1, 2]
    built = forge("build", path, "--json")
    assert (
        built.code == 1 and built.document["error"]["kind"] == "recipe" and "line 2" in built.document["error"]["why"]
    )
    assert forge("build", path, "--validate-only").code == 1
    path.write_text("name: a\nbase: b\nsteps: [{quantize: Q4_K_M}]\n")
    assert forge_json("validate-recipe", path) == {
        **{"recipe": str(path), "valid": True, "problems": [], "name": "a", "steps": ["quantize"]},
    }
    assert "base b -> quantize -> a" in forge("validate-recipe", path).out
    assert forge("validate-recipe", tmp_path / "none.yaml").code == 1


EXAMPLES = [path.read_text() for path in sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.*"))]
PIECES = [
    *("{", "}", "[", "]", ":", "- ", "\n", "  ", "null", "~", '"', "'", "&a", "*a", "!!int", "${x}", "{{ y }}", "@x"),
    *(
        "1e999",
        "nan",
        "-5",
        "hf:",
        "hf:a/b",
        "../..",
        "\0",
        "9" * 30,
        "variables",
        "merge",
        "messages",
        "stop",
        "width",
    ),
]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_recipe_it_is_read_or_refused_with_words(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(EXAMPLES))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 8)))
        text = text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[end:]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    checked = check_recipe(path)
    assert (checked.recipe is None) == bool(checked.problems)
    assert all(0 <= problem.line <= text.count("\n") + 2 and problem.what for problem in checked.problems)


def test_numbers_that_are_none_or_infinite_are_told_with_their_line(tmp_path: Path) -> None:
    checked = check(
        tmp_path,
        "name: a\nbase: b\nsteps:\n"
        "  - finetune:\n      data: .\n      lr: nan\n      epochs: inf\n      alpha: -5\n"
        "  - downsize:\n      target: 60%\n      data: .\n      lr: nan\n"
        "  - abliterate:\n      harmful: .\n      harmless: .\n      kernel_center: nan\n",
    )
    assert [problem.line for problem in checked.problems] == [6, 7, 8, 12, 16]
    assert all("finite number" in checked.problems[number].hint for number in (0, 1, 3, 4))
