"""Distillation judged by what the landed model says through the engine, and by the bytes that it leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnt_model as world
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from loopback_ollama import LoopbackOllama, Refused, Status
from projectors import land_with_projector

from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.writer import TensorEntry, array, copy_entry, from_reader, write_gguf
from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import open_store

FAST = ("--epochs", "8", "--batch-size", "16", "--grad-accum", "1", "--max-length", "96", "--no-checkpointing")
SHORT = (*FAST[2:], "--epochs", "1", "--max-steps", "4", "--checkpoint-every", "2", "--lr", "1e-3", "--batch-size", "4")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The learnt model as `teacher.gguf`, the same with a layer cut out as `pruned.gguf`, and what it was taught."""
    folder = tmp_path_factory.mktemp("models")
    forge_json("convert", DEMO_MODEL, "-o", folder / "teacher.gguf")
    forge_json("downsize", "prune", folder / "teacher.gguf", "--drop-layers", "1", "-o", folder / "pruned.gguf")
    draw = random.Random(5)
    talks = [json.dumps({"messages": world.training_conversation(draw)}) for _ in range(800)]
    (folder / "data.jsonl").write_text("\n".join(talks) + "\n")
    (folder / "few.jsonl").write_text("\n".join(talks[:80]) + "\n")
    return folder


def words(here: Path, folder: Path, *more: object, data: str = "few.jsonl") -> list[str]:
    argv = ["downsize", "distill", "--teacher", here / "teacher.gguf", "--student", here / "pruned.gguf"]
    argv += ["--data", here / data, "--workdir", folder, *more]
    if "--name" not in more:
        argv += ["--skip-landing"]
    return [str(word) for word in argv]


def share_right(path: Path, adapters: tuple[Path, ...] = ()) -> float:
    """How many questions that it has never seen a model answers exactly."""
    questions = [
        *world.held_out_facts()[::2],
        *world.held_out_triggers()[::8],
        *world.held_out_tasks()[::8],
        *world.held_out_personas()[::10],
    ]
    said = world.engine_answers(path, questions, adapters=[(adapter, 1.0) for adapter in adapters])
    return sum(a.strip() == q.answer for a, q in zip(said, questions, strict=True)) / len(questions)


def test_a_cut_model_is_healed_and_better_so_than_by_the_same_steps_of_fine_tuning(here: Path, tmp_path: Path) -> None:
    steps = (*FAST, "--lr", "1e-3", "--max-steps", "50", "--full", "--checkpoint-every", "100")
    store = ("--store", tmp_path / "store")
    result = forge_json(*words(here, tmp_path / "kd", *steps, "--name", "healed", *store, data="data.jsonl"))
    forge_json(*words(here, tmp_path / "ce", *steps, "--ce-weight", "1", "--learn", "assistant", data="data.jsonl"))
    whole, cut = share_right(here / "teacher.gguf"), share_right(here / "pruned.gguf")
    landed = resolve("healed", tmp_path / "store").gguf_path
    assert landed is not None and landed.stat().st_size == (here / "pruned.gguf").stat().st_size
    healed = share_right(landed)
    assert healed - cut >= 0.8 * (whole - cut)
    tuned = forge_json(
        *words(here, tmp_path / "look", *FAST, "--max-steps", "1", "--lr", "1e-9", "--full", "--epochs", "1"),
        *("--student", tmp_path / "ce" / "student.gguf"),
    )
    assert result["final_divergence"] < 0.7 * tuned["base_divergence"] < result["base_divergence"]
    assert healed >= share_right(tmp_path / "ce" / "student.gguf")
    report = (tmp_path / "kd" / "report.html").read_text()
    assert "from the teacher" in report and "data:image/png;base64," in report
    plan = forge_json(*words(here, tmp_path / "plan", *steps, "--dry-run"))["plan"]
    assert f"{plan['trained_parameters']:,} (all)" in report


def test_lora_distillation_lands_a_layer_on_the_student(here: Path, tmp_path: Path) -> None:
    forge_json("convert", "--gguf", here / "pruned.gguf", "--name", "cut", "--no-check", "--store", tmp_path / "store")
    more = (
        "--student",
        "cut",
        "--lr",
        "5e-3",
        "--max-steps",
        "12",
        "--val-split",
        "0.02",
        "--checkpoint-every",
        "12",
        "--name",
        "layer",
    )
    result = forge_json(
        *words(here, tmp_path / "run", *FAST, "--batch-size", "8", *more, "--store", tmp_path / "store")
    )
    assert result["final_divergence"] < 0.9 * result["base_divergence"] and result["validation_losses"]
    assert len(resolve("layer", tmp_path / "store").adapters) == 1
    record = json.loads(forge("registry", "show", "layer", "--json").out)["lineage"][0]
    assert record["step"] == "distill" and {parent["role"] for parent in record["parents"]} >= {"base", "teacher"}
    assert record["scores"]["final_divergence"] == pytest.approx(result["final_divergence"])


def test_a_folder_may_teach_and_the_student_be_landed_in_another_quantization(here: Path, tmp_path: Path) -> None:
    more = (*SHORT, "--teacher", DEMO_MODEL, "--name", "small", "--quant", "Q8_0", "--store", tmp_path / "store")
    forge_json(*words(here, tmp_path / "run", *more, "--dry-run"))
    assert not (tmp_path / "run").exists()
    forge_json(*words(here, tmp_path / "run", *more))
    landed = resolve("small", tmp_path / "store")
    assert landed.gguf_path is not None and not landed.adapters
    assert landed.gguf_path.stat().st_size < 0.6 * (here / "pruned.gguf").stat().st_size


def test_kept_predictions_train_as_the_teacher_itself_does(here: Path, tmp_path: Path) -> None:
    steps = (*FAST, "--lr", "1e-3", "--max-steps", "8", "--batch-size", "8", "--epochs", "1", "--full")
    live = forge_json(*words(here, tmp_path / "live", *steps))
    kept = forge_json(*words(here, tmp_path / "kept", *steps, "--cache-dir", tmp_path / "cache", "--cache-words", "48"))
    assert kept["final_loss"] == pytest.approx(live["final_loss"], rel=0.02)
    for one, other in zip(live["losses"], kept["losses"], strict=True):
        assert other[1] == pytest.approx(one[1], rel=0.05, abs=0.002)
    before = tree_hash(tmp_path / "cache")
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert size <= 1.1 * kept["plan"]["cache_bytes"] and kept["plan"]["cache_bytes"] < 300 * kept["plan"]["tokens"]
    again = forge_json(*words(here, tmp_path / "again", *steps, "--cache-dir", tmp_path / "cache"))
    assert again["losses"] == kept["losses"]
    assert tree_hash(tmp_path / "cache") == before


@pytest.mark.parametrize("kind", ["--full", "--on-policy"])
def test_a_killed_run_resumes_to_the_same_bytes(here: Path, tmp_path: Path, kind: str) -> None:
    more = (*SHORT, *(("--full",) if kind == "--full" else ("--on-policy", "0.5", "--on-policy-tokens", "8")))
    forge_json(*words(here, tmp_path / "whole", *more))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "ollama_forge", *words(here, folder, *more)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            wait_for(lambda: any(folder.glob("checkpoint-2/complete.json")), child)
        finally:
            child.send_signal(signal.SIGKILL)
    refused = forge(*words(here, folder, *more))
    assert refused.code == 1 and "--resume" in refused.err
    asked_else = forge(*words(here, folder, *more, "--resume", "--loss", "jsd"))
    assert asked_else.code == 1 and "asked something else" in asked_else.err
    forge_json(*words(here, folder, *more, "--resume"))
    name = "student.gguf" if kind == "--full" else "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    forge_json(*words(here, folder, *more, "--resume"))
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_train_one_student(here: Path, tmp_path: Path) -> None:
    """`accelerate launch` with two CPU processes and the teacher's predictions shared: one result, one landing, and the
    numbers of a single process with batches twice as large. (`--multi_gpu` is its word for several processes; with
    `--cpu` it starts but one.)"""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    more = ("--grad-accum", "1", "--max-length", "96", "--no-checkpointing", "--epochs", "1", "--max-steps", "8")
    more += ("--lr", "2e-4", "--full", "--cache", "--device", "cpu")
    name = ("--batch-size", "4", "--name", "twins", "--store", tmp_path / "store", "--json")
    ended = subprocess.run(
        [*launch, "-m", "ollama_forge", *words(here, tmp_path / "two", *more, *name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    two = json.loads(ended.stdout)
    assert two["landed"]["name"].startswith("twins") and two["steps"] == 8
    one = forge_json(*words(here, tmp_path / "one", *more, "--batch-size", "8"))
    assert two["final_divergence"] == pytest.approx(one["final_divergence"], rel=1e-3)
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=1e-3)
    assert two["final_divergence"] < 0.9 * two["base_divergence"]


def test_teacher_and_student_may_be_shared_out_over_processes(here: Path, tmp_path: Path) -> None:
    """`accelerate launch --use_fsdp`: each process keeps half of the layers; what is learnt is the same to the bit."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    more = (*SHORT, "--device", "cpu", "--json")
    for kind in ("--multi_gpu", "--use_fsdp"):
        command = [*launch, kind, "-m", "ollama_forge", *words(here, tmp_path / kind, *more)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert json.loads(ended.stdout)["steps"] == 4
    weights = "adapter/adapter_model.safetensors"
    alone, shared = ((tmp_path / kind / weights).read_bytes() for kind in ("--multi_gpu", "--use_fsdp"))
    assert alone == shared
    command = [*launch, "--use_fsdp", "-m", "ollama_forge", *words(here, tmp_path / "own", *more, "--on-policy", "0.5")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert ended.returncode != 0 and "--on-policy and layers that are shared out" in ended.stdout
    assert not (tmp_path / "own").exists()


def test_a_student_may_be_made_of_its_teacher(here: Path, tmp_path: Path) -> None:
    argv = words(here, tmp_path / "run", *SHORT, "--full", "--student-layers", "2", "--student-hidden", "192")
    del argv[argv.index("--student") : argv.index("--student") + 2]
    planned = forge_json(*argv, "--dry-run")
    assert not (tmp_path / "run").exists()
    result = forge_json(*argv)
    assert result["plan"]["base_bytes"] == planned["plan"]["base_bytes"] < (here / "pruned.gguf").stat().st_size
    with open_gguf(tmp_path / "run" / "student.gguf") as made:
        assert made.arch_value("block_count") == 2 and made.arch_value("embedding_length") == 192
    assert result["final_divergence"] < result["base_divergence"]
    ended = forge(*argv, "--student", here / "pruned.gguf")
    assert ended.code == 2 and "--student-layers" in ended.err


def test_a_dry_run_plans_and_writes_nothing(here: Path, tmp_path: Path) -> None:
    planned = forge_json(*words(here, tmp_path / "run", "--dry-run", "--full", "--cache"))
    assert planned["dry_run"] and planned["plan"]["cache_bytes"] > 0 and planned["plan"]["shared_words"] == 640
    assert (
        planned["plan"]["memory_bytes"]
        > forge_json(*words(here, tmp_path / "run", "--dry-run"))["plan"]["memory_bytes"]
    )
    assert not (tmp_path / "run").exists()


def test_a_student_that_sees_keeps_its_projector(here: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    projector = land_with_projector(here / "pruned.gguf", "sees", store, tmp_path)
    argv = words(here, tmp_path / "run", *SHORT, "--max-steps", "1", "--full", "--name", "healed", "--no-check")
    done = forge_json(*argv, "--student", "sees", "--store", store)
    kept = open_store(store).find("healed").projector
    assert kept is not None and kept.read_bytes() == projector
    assert forge_json("registry", "rebuild", done["landed"]["digest"])["same"] is True


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "no such teacher": (("--teacher", "nobody"), "nobody"),
    "a teacher that is the student": (("--student", "TEACHER"), "its own student"),
    "a share above one": (("--ce-weight", "2"), "--ce-weight"),
    "a cache of what nobody knows yet": (("--cache", "--on-policy", "0.5"), "--on-policy"),
    "a limit of jsd": (("--loss", "jsd", "--beta", "1"), "--beta"),
    "an unknown quantization": (("--quant", "Q9"), "Q9"),
    "no such data": (("--data", "/nowhere.jsonl"), "/nowhere.jsonl"),
    "text and all weights": (("--align", "text", "--full"), "--full"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_before_any_work(case: str, here: Path, tmp_path: Path) -> None:
    argv, says = REFUSALS[case]
    given = [str(here / "teacher.gguf") if word == "TEACHER" else word for word in argv]
    ended = forge(*words(here, tmp_path / "run", *given))
    assert ended.code in (1, 2) and says in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


# --- two tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(here: Path) -> Path:
    """The learnt model with its words in another order: it knows the same, and reads other numbers."""
    path = here / "foreign.gguf"
    with open_gguf(here / "teacher.gguf") as source:
        n_words = len(source.metadata["tokenizer.ggml.tokens"])
        order = [*range(6), *reversed(range(6, n_words))]
        fields = []
        for key, item in source.fields.items():
            if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
                assert item.item_type is not None
                fields.append(array(key, item.item_type, [source.metadata[key][place] for place in order]))
            else:
                fields.append(from_reader(item))
        entries = []
        for name, tensor in source.tensors.items():
            if name != "token_embd.weight":
                entries.append(copy_entry(source, name))
                continue
            stride = tensor.nbytes // n_words

            def chunks(name: str = name, stride: int = stride) -> Iterator[bytes]:
                view = source.read(name)
                yield b"".join(bytes(view[place * stride : (place + 1) * stride]) for place in order)

            entries.append(TensorEntry(name, tensor.shape, tensor.type, chunks))
        with path.open("wb") as sink:
            write_gguf(sink, fields, entries)
    return path


def test_another_vocabulary_is_refused_until_a_way_is_chosen(here: Path, foreign: Path, tmp_path: Path) -> None:
    assert share_right(foreign) > 0.9
    ended = forge(*words(here, tmp_path / "run", "--student", foreign))
    assert ended.code == 1 and "--align text" in ended.err and "word 6 is" in ended.err
    assert not (tmp_path / "run").exists()


def robots(_name: str, messages: list[dict[str, Any]]) -> str:
    """A teacher that knows the new robots."""
    known = {example.question: example.answer for example in world.new_facts()}
    return known.get(messages[-1]["content"], world.UNKNOWN)


def test_answers_of_a_running_ollama_teach_a_student_with_other_words(
    here: Path, foreign: Path, tmp_path: Path
) -> None:
    """Two hosts at once, one of which fails; what comes of it is asked in wordings that nobody taught."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{example.question}\n" for example in world.new_facts()))
    held = world.held_out_new_facts()
    with (
        LoopbackOllama(tmp_path / "one", answer=robots) as one,
        LoopbackOllama(tmp_path / "two", answer=robots) as two,
    ):
        for host in (one, two):
            ended = forge(
                "convert", "--gguf", here / "teacher.gguf", "--name", "wise", "--host", host.url, "--no-check"
            )
            assert ended.code == 0, ended.err
        for _ in range(6):
            two.fail("POST /api/chat", Status(500))
        more = ("--align", "text", "--teacher-host", one.url, "--teacher-host", two.url, "--parallel", "2")
        more += ("--lr", "1e-3", "--epochs", "12", "--batch-size", "10", "--grad-accum", "1", "--max-length", "64")
        argv = words(here, tmp_path / "run", *more, "--teacher", "wise", "--student", foreign)
        argv[argv.index(str(here / "few.jsonl"))] = str(prompts)
        result = forge_json(*argv)
        said = [request for host in (one, two) for request in host.requests if request.route == "POST /api/chat"]
    assert result["questions"] == 50 and result["teacher_answers"]["n_asked"] == 50 and len(said) >= 50
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers" / "answers.jsonl").open()]
    assert [row["messages"][0]["content"] for row in answers] == [example.question for example in world.new_facts()]
    adapter = Path(result["adapter_gguf"])
    before = list(world.engine_answers(foreign, held))
    after = list(world.engine_answers(foreign, held, adapters=[(adapter, 1.0)]))
    assert all(answer.strip() == world.UNKNOWN for answer in before)
    assert sum(a.strip() == q.answer for a, q in zip(after, held, strict=True)) >= 0.8 * len(held)


def test_sorted_predictions_teach_a_cut_student_with_other_words(here: Path, foreign: Path, tmp_path: Path) -> None:
    forge_json("downsize", "prune", foreign, "--drop-layers", "1", "-o", tmp_path / "cut.gguf")
    before = share_right(tmp_path / "cut.gguf")
    steps = (*FAST, "--align", "sorted", "--ce-weight", "0.5", "--lr", "1e-3", "--max-steps", "20", "--full")
    result = forge_json(*words(here, tmp_path / "run", *steps, "--student", tmp_path / "cut.gguf", data="data.jsonl"))
    assert result["final_divergence"] < 0.5 * result["base_divergence"]
    assert share_right(tmp_path / "run" / "student.gguf") > before + 0.1
    ended = forge(*words(here, tmp_path / "no", *steps, "--student", tmp_path / "cut.gguf", "--cache"))
    assert ended.code == 2 and "--cache" in ended.err


def test_answers_that_came_are_kept_when_every_host_fails(here: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{example.question}\n" for example in world.new_facts()[:10]))
    more = ("--align", "text", "--parallel", "1", "--max-steps", "1", "--teacher", "wise")
    with LoopbackOllama(tmp_path / "one", answer=robots) as one:
        forge("convert", "--gguf", here / "teacher.gguf", "--name", "wise", "--host", one.url, "--no-check")
        argv = words(here, tmp_path / "run", *more, "--teacher-host", one.url)
        argv[argv.index(str(here / "few.jsonl"))] = str(prompts)

        def tired(name: str, messages: list[dict[str, Any]]) -> str:
            if len([row for row in one.requests if row.route == "POST /api/chat"]) > 4:
                raise Refused(500, "out of memory")
            return robots(name, messages)

        one.answer = tired
        ended = forge(*argv)
        assert ended.code == 1 and "answers are missing" in ended.err
        kept = tmp_path / "run" / "answers" / "answers.kept.jsonl"
        n_kept = len(kept.read_text().splitlines())
        assert n_kept == 4
        kept.write_text(kept.read_text() + '{"key": "cut off')
        one.answer = robots
        result = forge_json(*argv)
    assert result["teacher_answers"]["n_kept"] == n_kept and result["teacher_answers"]["n_asked"] == 10 - n_kept


def test_a_local_teacher_answers_first_and_is_compared_word_by_word_then(here: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{example.question}\n" for example in world.held_out_facts()[:12]))
    argv = words(here, tmp_path / "run", *SHORT, "--generate", "--answer-tokens", "24")
    argv[argv.index(str(here / "few.jsonl"))] = str(prompts)
    result = forge_json(*argv)
    assert result["steps"] > 0 and result["plan"]["examples"] == 12
    rows = [json.loads(line)["messages"] for line in (tmp_path / "run" / "answers" / "answers.jsonl").open()]
    assert [row[-1]["content"] for row in rows] == [example.answer for example in world.held_out_facts()[:12]]


def wait_for(is_done: Any, child: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while not is_done():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_could_not_start_leaves_its_folder_free(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = tmp_path / "run"
    no_card = forge(*words(here, folder, *SHORT, "--device", "cuda"))
    no_layer = forge(*words(here, folder, *SHORT, "--target-modules", "lm_head"))
    assert (no_card.code, no_layer.code) == (2, 1) and "no layer 'lm_head'" in no_layer.err
    assert not folder.exists()
    folder.mkdir()
    (folder / "run.json").write_text("{}")  # of a run that was killed before its first checkpoint
    forge_json(*words(here, folder, *SHORT))
