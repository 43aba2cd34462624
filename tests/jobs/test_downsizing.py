"""`downsize pipeline` from end to end, killed in the middle, refused before any work, and as a script."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import learnt_model as world
import pytest
from command import DEMO_MODEL, SCRIPT_START, forge, forge_json, tree_hash
from projectors import land_with_projector
from tiny_models import build_model
from tiny_store import snapshot

from ollama_forge.cli import root
from ollama_forge.jobs.downsizing_plan import LOWER_TYPES, parse_goal
from ollama_forge.jobs.downsizing_report import Row, judge_rows
from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import Store, open_store

HEAL = ("--full", "--lr", "1e-3", "--batch-size", "8", "--grad-accum", "1", "--max-steps", "6", "--max-length", "96")
NASTY = "a 'b' \"c\" $(touch PWNED) `touch PWNED` ; touch PWNED #"
SAID = (
    "--template",
    "{{ .System }}|{{ .Prompt }}",
    "--stop",
    NASTY,
    "--temperature",
    "0.5",
    "--message",
    f"user={NASTY}",
    "--license",
    f"MIT\n{NASTY}",
)
ASKED = ("--num-ctx", "512", "--message", "assistant=-Yes.\n", "--license", "Mine.")
"""What the model says beside its weights, and what a command asks for on top."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    forge_json("convert", DEMO_MODEL, "-o", folder / "whole.gguf")
    draw = random.Random(5)
    talks = [json.dumps({"messages": world.training_conversation(draw)}) for _ in range(90)]
    (folder / "data.jsonl").write_text("\n".join(talks[:64]) + "\n")
    (folder / "judge.jsonl").write_text("\n".join(talks[64:]) + "\n")
    return folder


def words(here: Path, folder: Path, *more: object) -> list[str]:
    argv: list[object] = ["downsize", "pipeline", here / "whole.gguf", "--name", "small", "--data", here / "data.jsonl"]
    argv += ["--text", here / "judge.jsonl", "--workdir", folder / "work", "--store", folder / "store", *more]
    return [str(word) for word in argv]


@pytest.fixture(scope="module")
def finished(here: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, result) of a pipeline that nobody stopped, from a model in Ollama that says something."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "system").write_text(f"@home, be brief.\n{NASTY}\n")
    landing = ("--name", "whole", "--store", folder / "store", "--no-check")
    forge_json("convert", "--gguf", here / "whole.gguf", *landing, *SAID, "--system", f"@{folder / 'system'}")
    argv = words(here, folder, "--target", "75%", "--quant", "Q8_0", *HEAL, *ASKED)
    argv[argv.index(str(here / "whole.gguf"))] = "whole"
    return folder, forge_json(*argv)


def test_it_ends_with_five_models_measured_and_a_sentence(finished: tuple[Path, Any], here: Path) -> None:
    folder, result = finished
    rows = {row["name"]: row for row in result["models"]}
    assert list(rows)[:4] == ["original", "pruned", "healed", "healed, Q8_0"]
    assert rows["original"]["kl_mean"] == 0 and rows["healed"]["kl_mean"] < rows["pruned"]["kl_mean"]
    assert rows["healed"]["perplexity"] < rows["pruned"]["perplexity"]
    plan = result["plan"]
    assert rows["pruned"]["bytes"] == rows["healed"]["bytes"] == (folder / "work" / "step-1-healed.gguf").stat().st_size
    assert rows["healed"]["bytes"] == plan["steps"][0]["bytes"]
    assert rows["healed, Q8_0"]["bytes"] == plan["final_bytes"]
    lower = result["models"][-1]
    assert (
        lower["name"] == f"original, {plan['lower_quantization']}"
        and lower["bytes"] == plan["lower_quantization_bytes"] <= plan["final_bytes"]
    )
    assert "better choice" in result["verdict"]  # six steps of healing do not make up for a layer
    assert all(row["tokens_per_second"] > 0 for row in result["models"])
    page = (folder / "work" / "report.html").read_text()
    assert "better choice" in page and "data:image/png;base64," in page
    landed = resolve("small", folder / "store").gguf_path
    assert landed is not None and landed.read_bytes() == (folder / "work" / "final.gguf").read_bytes()
    record = json.loads(forge("registry", "show", "small", "--json").out)["lineage"][-1]
    assert result["undo"] == [f"ollama-forge rm small:latest --store {folder / 'store'}", f"rm -r {folder / 'work'}"]
    assert record["step"] == "downsize" and {parent["role"] for parent in record["parents"]} >= {"base", "data"}


def test_a_target_in_bytes_counts_header_and_vocabulary(here: Path, tmp_path: Path) -> None:
    def planned(target: int) -> Any:
        return forge_json(*words(here, tmp_path, "--target", f"{target / 1000}KB", "--quant", "Q8_0", "--dry-run"))[
            "plan"
        ]

    two_layers = planned(1_100_000)
    assert two_layers["steps"][-1]["layers"] == 2
    exact = two_layers["final_bytes"]
    assert planned(exact)["final_bytes"] == exact
    assert planned(exact - 1)["steps"][-1]["layers"] == 1
    ended = forge(*words(here, tmp_path, "--target", "600KB", "--quant", "Q8_0", "--dry-run"))
    assert ended.code == 2 and f"{planned(exact - 1)['final_bytes']:,} bytes" in ended.err


def test_killed_three_times_it_ends_with_the_same_bytes(finished: tuple[Path, Any], here: Path, tmp_path: Path) -> None:
    argv = words(here, tmp_path, "--target", "75%", "--quant", "Q8_0", *HEAL)
    work = tmp_path / "work"
    for is_reached in (
        lambda: (work / "step-1-pruned.gguf").exists(),
        lambda: any(work.glob("heal-1/checkpoint-3/complete.json")),
        lambda: (work / "step-1-healed.gguf").exists(),
    ):
        kill_when(argv, is_reached)
    forge_json(*argv)
    for name in ("step-1-pruned.gguf", "step-1-healed.gguf", "final.gguf", "lower.gguf"):
        assert (work / name).read_bytes() == (finished[0] / "work" / name).read_bytes(), name
    before = tree_hash(work)
    again = forge(*argv)
    assert again.code == 1 and "small" in again.err and tree_hash(work) == before


def test_a_model_that_sees_still_does(here: Path, tmp_path: Path) -> None:
    projector = land_with_projector(here / "whole.gguf", "sees", tmp_path / "store", tmp_path)
    argv = words(here, tmp_path, "--target", "75%", *HEAL, "--no-check")
    argv[argv.index(str(here / "whole.gguf"))] = "sees"
    script = forge(*argv, "--write-script", tmp_path / "d.sh", "--dry-run")
    assert script.code == 0 and "projector of 'sees'" in script.err and "projector" not in script.out
    result = forge_json(*argv)
    kept = open_store(tmp_path / "store").find("small").projector
    assert kept is not None and kept.read_bytes() == projector
    assert forge_json("registry", "rebuild", result["landed"]["digest"])["same"] is True


def test_a_pipeline_is_made_again_from_its_record(finished: tuple[Path, Any], here: Path) -> None:
    folder, result = finished
    before = snapshot(folder)
    rebuilt = forge_json("registry", "rebuild", result["landed"]["digest"])
    assert rebuilt["same"] is True and [step["step"] for step in rebuilt["steps"]] == ["downsize"]
    assert snapshot(folder) == before
    kept = (here / "judge.jsonl").read_bytes()
    (here / "judge.jsonl").write_bytes(kept + b"\n")
    ended = forge("registry", "rebuild", result["landed"]["digest"], "--json")
    (here / "judge.jsonl").write_bytes(kept)
    assert ended.code == 1 and "The text" in ended.document["error"]["what"]
    assert str(here / "judge.jsonl") in ended.document["error"]["what"]


def kill_when(argv: list[str], is_reached: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "ollama_forge", *argv]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as child:
        try:
            deadline = time.monotonic() + 300
            while not is_reached():
                if child.poll() is not None:
                    said.seek(0)
                    raise AssertionError(said.read()[-3000:])
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            child.send_signal(signal.SIGKILL)


def test_ctrl_c_while_it_heals_says_that_the_same_command_goes_on(here: Path, tmp_path: Path) -> None:
    argv = words(here, tmp_path, "--target", "75%", "--max-length", "64", "--max-steps", "400", "--batch-size", "4")
    command = [sys.executable, "-m", "ollama_forge", *argv]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 300
        while not any(tmp_path.glob("work/heal-1/checkpoint-*/complete.json")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "Traceback" not in err
    assert "Run the same command again" in err and "--resume" not in err


def test_lora_healing_of_a_folder_in_two_steps_through_a_cache(here: Path, tmp_path: Path) -> None:
    more = ("--target", "45%", "--cache", "--max-steps", "2", "--batch-size", "4", "--max-length", "64", "--no-check")
    argv = words(here, tmp_path, *more)
    argv[argv.index(str(here / "whole.gguf"))] = str(DEMO_MODEL)
    result = forge_json(*argv)
    assert [step["layers"] for step in result["plan"]["steps"]] == [2, 1]
    assert len(list((tmp_path / "work" / "teacher").iterdir())) == 1  # both steps read what was kept once
    assert (tmp_path / "work" / "step-2-healed.gguf").stat().st_size == result["plan"]["final_bytes"]
    assert (tmp_path / "work" / "step-2-healed.gguf").stat().st_size < 0.5 * (here / "whole.gguf").stat().st_size
    shutil.move(tmp_path / "work", tmp_path / "moved")
    assert forge_json("registry", "rebuild", result["landed"]["digest"])["same"] is True
    shutil.move(tmp_path / "moved", tmp_path / "work")
    other = forge(*argv, "--rank", "4", "--name", "other")
    assert other.code == 1 and "another downsizing" in other.err and f"rm -r {tmp_path / 'work'}" in other.err


def test_what_a_healing_warns_of_is_in_the_result(tmp_path: Path) -> None:
    build_model("qwen3_moe", tmp_path / "moe")
    talk = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(talk) + "\n")
    result = forge_json(
        *("downsize", "pipeline", tmp_path / "moe", "--target", "80%", "--data", tmp_path / "data.jsonl"),
        *("--name", "moe", "--store", tmp_path / "store", "--workdir", tmp_path / "work", "--no-check"),
        *("--max-steps", "1", "--lr", "1e-2"),
    )
    assert [text for text in result["warnings"] if "12 matrices of experts are not trained" in text]


def test_a_dry_run_prints_steps_with_memory_disk_and_time(here: Path, tmp_path: Path) -> None:
    shown = forge(*words(here, tmp_path, "--target", "45%", "--dry-run"))
    assert shown.code == 0 and "1. cut to 2 layers" in shown.err and "2. cut to 1 layers" in shown.err
    assert "of memory" in shown.err and "of disk" in shown.err and "Nothing was changed" in shown.out
    assert not list(tmp_path.iterdir())


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "a target larger than the source": (("--target", "2B"), "not smaller"),
    "more bytes than the source has": (("--target", "3MB"), "not smaller"),
    "less than one layer": (("--target", "20%"), "cannot be met"),
    "no size at all": (("--target", "tiny"), "--target"),
    "everything": (("--target", "100%"), "--target"),
    "no such quantization": (("--target", "75%", "--quant", "Q9"), "Q9"),
    "no such data": (("--target", "75%", "--data", "/nowhere.jsonl"), "/nowhere.jsonl"),
    "no such text": (("--target", "75%", "--text", "/nowhere.txt"), "/nowhere.txt"),
    "a bad name": (("--target", "75%", "--name", "../x"), "../x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_met_is_refused_before_any_work(case: str, here: Path, tmp_path: Path) -> None:
    argv, says = REFUSALS[case]
    ended = forge(*words(here, tmp_path, *argv))
    assert ended.code in (1, 2) and says in ended.err and "Traceback" not in ended.err
    assert not list(tmp_path.iterdir())


def test_healing_needs_data(here: Path) -> None:
    ended = forge("downsize", "pipeline", here / "whole.gguf", "--name", "x", "--target", "75%")
    assert ended.code == 2 and "--data" in ended.err


def test_a_size_is_parameters_bytes_or_a_share() -> None:
    assert parse_goal("3B").n_parameters == 3e9 and parse_goal("500m").n_parameters == 5e8
    assert parse_goal("2GB").size_bytes == 2e9 and parse_goal("1.5 gb").size_bytes == 1.5e9
    assert parse_goal("40%").share == 0.4


def test_a_target_in_bytes_is_met_by_the_quantized_result(here: Path, tmp_path: Path) -> None:
    planned = forge_json(*words(here, tmp_path, "--target", "1.1MB", "--quant", "Q8_0", "--dry-run"))
    assert planned["plan"]["final_bytes"] <= 1_100_000 and planned["plan"]["steps"][-1]["layers"] == 2
    assert planned["plan"]["lower_quantization"] in LOWER_TYPES


@pytest.mark.parametrize(
    ("lower", "says"),
    [
        (Row("q3", 100, 6.0, 0.2, 9.0), "The lower quantization is the better choice: 'q3'"),
        (Row("q3", 200, 6.0, 0.2, 9.0), "'q3' is nearer to the original than 'healed', but larger"),
        (Row("q3", 100, 9.0, 0.9, 9.0), "'healed' is nearer to the original than 'q3'"),
    ],
)
def test_the_last_sentence_says_which_is_better(lower: Row, says: str) -> None:
    assert judge_rows([Row("original", 300, 5.0, 0.0, 5.0), Row("healed", 100, 7.0, 0.4, 9.0), lower]).startswith(says)


def test_the_script_runs_under_bash_with_every_word_quoted(here: Path, tmp_path: Path) -> None:
    """A program that writes down its words stands for the tool; each line must be one that the tool understands."""
    data = tmp_path / f"{NASTY}.jsonl"
    data.write_bytes((here / "data.jsonl").read_bytes())
    script, log, bin_dir = tmp_path / "downsize.sh", tmp_path / "log.jsonl", tmp_path / "bin"
    argv = words(here, tmp_path, "--target", "45%", "--quant", "Q8_0", "--lr", "1e-3", "--no-check", "--force")
    argv[argv.index(str(here / "data.jsonl"))] = str(data)
    wrote = forge_json(*argv, "--write-script", script)
    assert wrote["script"] == str(script) and script.stat().st_mode & stat.S_IXUSR
    assert not (tmp_path / "work").exists()
    bin_dir.mkdir()
    tool = bin_dir / "ollama-forge"
    tool.write_text(
        f"{SCRIPT_START}import json, pathlib, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "if '-o' in sys.argv: pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).touch()\n"
    )
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    for _ in range(2):
        subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, check=True, capture_output=True)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert not list(tmp_path.glob("PWNED*"))
    verbs = [" ".join(call[:2]) if call[0] == "downsize" else call[0] for call in calls]
    step = ["downsize prune", "measure", "downsize distill", "merge", "measure"]
    assert verbs[:14] == [*step, *step, "quantize", "measure", "quantize", "measure"]
    assert verbs[14] == "create-from-base" and "downsize prune" not in verbs[15:]
    distill = next(call for call in calls if call[:2] == ["downsize", "distill"])
    assert distill[distill.index("--data") + 1] == str(data) and distill[-2:] == ["--lr", "0.001"]
    context = click.Context(root)
    for call in calls:
        command = root.get_command(context, call[0])
        given = call[1:]
        while isinstance(command, click.Group):
            command = command.get_command(context, given.pop(0))
        assert command is not None
        command.make_parser(click.Context(command)).parse_args(given)


def test_the_script_lands_what_the_command_lands(finished: tuple[Path, Any], here: Path, tmp_path: Path) -> None:
    """A program that gives the files of the finished pipeline for those that it should make, and lands in earnest."""
    folder, result = finished
    argv = words(here, tmp_path, "--target", "75%", "--quant", "Q8_0", *HEAL, *ASKED, "--no-check")
    argv[argv.index(str(here / "whole.gguf"))] = "whole"
    argv[argv.index(str(tmp_path / "store"))] = str(folder / "store")
    argv[argv.index("small")] = "scripted"
    forge_json(*argv, "--write-script", tmp_path / "downsize.sh")
    tool = tmp_path / "bin" / "ollama-forge"
    tool.parent.mkdir()
    tool.write_text(
        f"{SCRIPT_START}import os, pathlib, shutil, sys\nwords = sys.argv[1:]\n"
        "if words[0] == 'create-from-base':\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'ollama_forge', *words])\n"
        "if '-o' in words:\n"
        "    made = pathlib.Path(words[words.index('-o') + 1])\n"
        f"    shutil.copyfile(pathlib.Path({str(folder / 'work')!r}, made.name), made)\n"
        "if words[:2] == ['downsize', 'distill']:\n"
        "    healed = pathlib.Path(words[words.index('--workdir') + 1])\n"
        "    healed.mkdir()\n"
        f"    shutil.copyfile({str(folder / 'work' / 'step-1-healed.gguf')!r}, healed / 'student.gguf')\n"
    )
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    subprocess.run(["bash", "downsize.sh"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    said = resolve("scripted", folder / "store").modelfile
    assert said.system == (folder / "system").read_text() and said.template == "{{ .System }}|{{ .Prompt }}"
    assert dict(said.parameters) == {"num_ctx": 512, "stop": (NASTY,), "temperature": 0.5}
    assert [turn.content for turn in said.messages] == [NASTY, "-Yes.\n"]
    assert said.licenses == (f"MIT\n{NASTY}", "Mine.")
    assert Store(folder / "store").find("scripted").digest == result["landed"]["digest"]
    assert not list(tmp_path.rglob("PWNED*"))


def test_a_folder_is_converted_first_in_the_script(here: Path, tmp_path: Path) -> None:
    argv = ["downsize", "pipeline", DEMO_MODEL, "--name", "x", "--target", "75%", "--data", here / "data.jsonl"]
    text = forge_json(*argv, "--write-script", tmp_path / "d.sh", "--dry-run")["text"]
    assert 'ollama-forge convert "$MODEL" -o "$WORKDIR/original.gguf"' in text
    assert not (tmp_path / "d.sh").exists()


def test_a_pipeline_that_could_not_start_leaves_its_folder_free(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(here, tmp_path, "--target", "60%", "--max-steps", "1", "--max-length", "64", "--no-check")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert forge(*argv, "--device", "cuda").code == 2 and not (tmp_path / "work").exists()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pipeline.json").write_text("{}")  # of one that was killed before its first cut
    forge_json(*argv)
