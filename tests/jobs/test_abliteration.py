"""Refusals of small models that have learnt to refuse go away, through the engine, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import learnt_model as world
import pytest
from ablation_models import LAYOUTS, random_directions, refuser, share_left, to_gguf

from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.render import render_prompt
from ollama_forge.errors import AdapterError, DatasetError, ExistsError, TemplateError, UnsupportedError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.writer import copy_entry, from_reader, write_gguf
from ollama_forge.jobs.abliteration import ApplyOptions, apply_ablation
from ollama_forge.jobs.directions import ComputedDirections, ComputeOptions, compute_direction
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.train.direction_options import DirectionOptions
from ollama_forge.transform.ablation import AblationOptions
from ollama_forge.transform.directions import read_directions, write_directions

REFUSED = world.trained_prompts(world.VEGETABLES, 96)
ANSWERED = world.trained_prompts(world.HOUSE_THINGS, 96)
QUANTS = (None, "Q8_0", "Q4_K_M")
UNTRIED = ComputeOptions(try_prompts=False)


def gguf(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), gguf_path=path)


def compute(source: Path, output: Path, options: ComputeOptions = UNTRIED) -> ComputedDirections:
    return compute_direction(gguf(source), REFUSED, ANSWERED, output, options)


@dataclass(frozen=True)
class Behaviour:
    """What a model says to questions that neither it nor the direction was made from."""

    triggers: list[str]
    others: list[str]

    @property
    def refused(self) -> float:
        return sum(world.is_refusal(text) for text in self.triggers) / len(self.triggers)

    @property
    def broken(self) -> int:
        """Answers to triggers that do not stop."""
        return sum(text.endswith("[does not stop]") for text in self.triggers)


def ask(path: Path, adapters: tuple[tuple[Path, float], ...] = ()) -> Behaviour:
    capitals = [example for example in world.held_out_facts() if example.kind == "capital"]
    triggers, others = world.held_out_triggers()[::5], [*world.held_out_tasks()[::8], *capitals[::2]]
    said = world.engine_answers(path, [*triggers, *others], adapters=adapters)
    return Behaviour(said[: len(triggers)], said[len(triggers) :])


def harmless_kl(this: Path, against: Path) -> float:
    """Mean KL in nats over the tokens of the untouched model's answers to harmless prompts."""
    from ollama_forge.measure.answer_shift import compare_answers
    from ollama_forge.train.ablation_trials import generate_greedily
    from ollama_forge.train.scored_model import scored_model
    from ollama_forge.train.scoring import PackedPair

    prompts = [example.messages for example in world.held_out_tasks()[::8]]
    with open_gguf(against) as file:
        chat_format = chat_format_of(file.metadata)
    ids = [render_prompt(chat_format, messages) for messages in prompts]
    with scored_model(this) as edited, scored_model(against) as untouched:
        answers = generate_greedily(untouched, ids, chat_format.end_ids, 24)
        pairs = list(zip(ids, answers, strict=True))
        return compare_answers(PackedPair(edited, untouched), pairs).answers.kl.mean


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a learnt refuser."""
    return refuser(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("quant", QUANTS)
def test_refusals_go_away_and_nothing_else_does(layout: Path, quant: str | None, tmp_path: Path) -> None:
    source = to_gguf(layout, tmp_path / "in.gguf", "bf16", quant)
    computed = compute(source, tmp_path / "d.safetensors")
    out = tmp_path / "out.gguf"
    done = apply_ablation(gguf(source), tmp_path / "d.safetensors", out)

    before, after = ask(source), ask(out)
    unchanged = sum(one == other for one, other in zip(before.others, after.others, strict=True))
    assert before.refused >= 0.95
    assert after.refused <= 0.05 and after.broken == 0
    assert unchanged >= 0.97 * len(before.others)
    assert harmless_kl(out, source) < 0.1
    assert not done.warnings and not computed.warnings
    assert min(loss.survived for loss in done.losses) > 0.9


def test_a_random_direction_does_neither(layout: Path, tmp_path: Path) -> None:
    source = to_gguf(layout, tmp_path / "in.gguf", "bf16", "Q8_0")
    write_directions(tmp_path / "d.safetensors", random_directions(source, seed=3))
    apply_ablation(gguf(source), tmp_path / "d.safetensors", tmp_path / "out.gguf")
    before, after = ask(source), ask(tmp_path / "out.gguf")
    assert after.refused >= 0.95
    assert sum(one == other for one, other in zip(before.others, after.others, strict=True)) >= 0.9 * len(before.others)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's Llama as Q4_K_M, with its directions `d.safetensors` beside it."""
    home = tmp_path_factory.mktemp("demo")
    source = to_gguf(world.MODEL_DIR, home / "in.gguf", "bf16", "Q4_K_M")
    compute(source, home / "d.safetensors")
    return source


def test_what_was_taken_out_is_not_found_again(demo: Path, tmp_path: Path) -> None:
    directions = read_directions(demo.parent / "d.safetensors")
    apply_ablation(gguf(demo), demo.parent / "d.safetensors", tmp_path / "out.gguf")
    again = compute(tmp_path / "out.gguf", tmp_path / "again.safetensors").report
    old = directions.at(directions.best_layer)[0]
    assert abs(float(again.directions.at(directions.best_layer)[0] @ old)) < 0.15
    assert max(share_left(demo, tmp_path / "out.gguf", directions, AblationOptions()).values()) < 0.06
    before = compute(demo, tmp_path / "before.safetensors").report
    assert again.layers[directions.best_layer].gap < 0.8 * before.layers[directions.best_layer].gap


def test_the_adapter_does_the_same_and_can_be_switched_off(demo: Path, tmp_path: Path) -> None:
    options = AblationOptions(embedding=False)
    directions = demo.parent / "d.safetensors"
    apply_ablation(gguf(demo), directions, tmp_path / "lora.gguf", ApplyOptions(options, as_lora=True))
    base = to_gguf(world.MODEL_DIR, tmp_path / "f32.gguf")
    apply_ablation(gguf(base), directions, tmp_path / "edited.gguf", ApplyOptions(options))
    on, off, edited = (
        ask(base, ((tmp_path / "lora.gguf", 1.0),)),
        ask(base, ((tmp_path / "lora.gguf", 0.0),)),
        ask(tmp_path / "edited.gguf"),
    )
    assert on == edited and on.refused <= 0.05
    assert off == ask(base) and off.refused >= 0.95
    assert ask(demo, ((tmp_path / "lora.gguf", 1.0),)).refused <= 0.05


def test_other_ways_to_find_the_direction_work_too(demo: Path, tmp_path: Path) -> None:
    ways = {
        "median": DirectionOptions(method="median"),
        "three": DirectionOptions(n_directions=3),
        "projected": DirectionOptions(projected=True),
        "positions": DirectionOptions(positions=(-1, -2)),
    }
    for name, way in ways.items():
        path = tmp_path / f"{name}.safetensors"
        computed = compute(demo, path, ComputeOptions(way, try_prompts=False))
        apply_ablation(gguf(demo), path, tmp_path / f"{name}.gguf")
        assert ask(tmp_path / f"{name}.gguf").refused <= 0.1, name
        assert computed.picture.read_bytes().startswith(b"\x89PNG"), name


def test_the_same_prompts_give_the_same_file(demo: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compute(demo, tmp_path / f"{name}.safetensors", ComputeOptions(n_instructions=20, try_prompts=False))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_exchanged_lists_are_noticed(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="swapped"):
        compute_direction(gguf(demo), ANSWERED, REFUSED, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_a_model_that_refuses_nothing_gets_a_warning(demo: Path, tmp_path: Path) -> None:
    tasks = world.trained_prompts(world.HOUSE_THINGS, 40, seed=5)
    facts = [example.question for example in world.held_out_facts()]
    computed = compute_direction(gguf(demo), tasks, facts, tmp_path / "d.safetensors")
    assert any("refuses none" in warning for warning in computed.warnings)


def test_prompts_that_cannot_be_used_are_refused(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "d.safetensors"
    with pytest.raises(DatasetError, match="context"):
        compute_direction(gguf(demo), [*REFUSED, "turnip " * 1200], ANSWERED, output)
    with pytest.raises(UsageError, match="in both lists"):
        compute_direction(gguf(demo), REFUSED, [*ANSWERED, REFUSED[0]], output)
    with pytest.raises(DatasetError, match="1 harmful prompt"):
        compute_direction(gguf(demo), REFUSED[:1], ANSWERED, output)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        compute_direction(gguf(demo), REFUSED, ANSWERED, output, ComputeOptions(layer_fracs=(40.0,), try_prompts=False))
    assert not output.exists()


def test_a_model_without_a_chat_template_is_refused(demo: Path, tmp_path: Path) -> None:
    with open_gguf(demo) as file, atomic_output(tmp_path / "plain.gguf") as sink:
        fields = [from_reader(field) for key, field in file.fields.items() if "chat_template" not in key]
        write_gguf(sink, fields, [copy_entry(file, name) for name in file.tensors])
    with pytest.raises(TemplateError, match="no chat template"):
        compute_direction(gguf(tmp_path / "plain.gguf"), REFUSED, ANSWERED, tmp_path / "d.safetensors")


def test_a_family_without_rows_is_refused(demo: Path, tmp_path: Path) -> None:
    from ollama_forge.gguf.writer import string

    strange = tmp_path / "zebra.gguf"
    with open_gguf(demo) as file, atomic_output(strange) as sink:
        fields = [from_reader(field) for key, field in file.fields.items() if key != "general.architecture"]
        fields.append(string("general.architecture", "zebra"))
        write_gguf(sink, fields, [copy_entry(file, name) for name in file.tensors])
    with pytest.raises(UnsupportedError, match="zebra"):
        apply_ablation(gguf(strange), demo.parent / "d.safetensors", tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="zebra"):
        compute_direction(gguf(strange), REFUSED, ANSWERED, tmp_path / "d.safetensors")


def test_nothing_is_overwritten_and_no_model_is_edited_in_place(demo: Path, tmp_path: Path) -> None:
    directions = demo.parent / "d.safetensors"
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(ExistsError):
        apply_ablation(gguf(demo), directions, tmp_path / "out.gguf")
    with pytest.raises(ExistsError, match="the model itself"):
        apply_ablation(gguf(demo), directions, demo, overwrite=True)
    with pytest.raises(ExistsError):
        compute(demo, directions)
    with pytest.raises(UsageError, match=r"\.gguf"):
        apply_ablation(gguf(demo), directions, tmp_path / "out")
    with pytest.raises(AdapterError, match="Merge them first"):
        layered = ResolvedModel("x", gguf_path=demo, adapters=(demo,))
        apply_ablation(layered, directions, tmp_path / "other.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
