"""`abliterate run` on the model that refuses to talk about vegetables: in one command, in stages, broken off."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ablation_models import refuser
from command import DEMO_MODEL, forge, forge_json
from kill import kill_forks
from learnt_model import HOUSE_THINGS, VEGETABLES, engine_answers, held_out_facts, trained_prompts

from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import open_store
from ollama_forge.store.verify import verify_store
from ollama_forge.transform.directions import Directions, write_directions

N_PROMPTS = 48
SMALL = ("--num-eval-prompts", "8", "--num-prompts", "8", "--trial-tokens", "16", "--max-tokens", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store (`base`, Q4_K_M) and two lists of prompts."""
    folder = tmp_path_factory.mktemp("place")
    forge_json("import", DEMO_MODEL, "--name", "base", "--system", "Be helpful.", "--no-check", "--store", folder / "s")
    for name, nouns in (("harmful", VEGETABLES), ("harmless", HOUSE_THINGS)):
        (folder / f"{name}.txt").write_text("\n".join(trained_prompts(nouns, N_PROMPTS)) + "\n", encoding="utf-8")
    return folder


def words(place: Path, work: Path, name: str = "mine", *more: object) -> tuple[object, ...]:
    lists = ("--harmful", place / "harmful.txt", "--harmless", place / "harmless.txt")
    return (
        *("abliterate", "run", "--model", "base", "--name", name, *lists, "--output-dir", work),
        *("--store", place / "s", "--no-check", *more),
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> Any:
    """The document of a whole run, which made `whole`."""
    return forge_json(*words(place, place / "w", "whole", *SMALL))


def weights_digest(store: Path, name: str) -> str:
    layer = open_store(store).find(name).model_layer
    assert layer is not None
    return str(layer.digest)


def test_one_command_takes_refusals_out_and_nothing_else(place: Path, finished: Any) -> None:
    result = finished
    before, after = (result["evaluation"][side] for side in ("against", "this"))
    assert before["harmful"]["refusal_rate"] >= 0.95 and after["harmful"]["refusal_rate"] <= 0.05
    assert after["harmful"]["answered"] == 8 == after["harmless"]["answered"]
    assert result["evaluation"]["shift"]["first_kl"] < 0.1 and result["evaluation"]["shift"]["answer_kl"] < 0.1
    tried = result["choice"]["candidates"]
    chosen = next(item for item in tried if item["layer"] == result["choice"]["options"]["layer"])
    assert len(tried) == 3 and chosen["refused"] == min(item["refused"] for item in tried)
    assert result["matrices"] == {"attention_output": 3, "ffn_down": 3, "token_embedding": 1}
    assert Path(result["report"]).exists() and result["undo"][0].startswith("ollama-forge rm whole:latest")
    base, mine = (resolve(name, place / "s") for name in ("base", "whole"))
    assert mine.modelfile.system == base.modelfile.system == "Be helpful."
    assert base.gguf_path and mine.gguf_path
    facts = held_out_facts()[::6]
    assert engine_answers(mine.gguf_path, facts) == engine_answers(base.gguf_path, facts)
    lineage = forge_json("registry", "lineage", "whole")
    assert lineage["landing"]["step"] == "abliterate" and lineage["landing"]["scores"]["refusal_rate"] <= 0.05
    assert {parent["role"] for parent in lineage["parents"]} >= {"base", "prompts"}


def test_done_again_it_changes_nothing(place: Path, finished: Any) -> None:
    again = forge_json(*words(place, place / "w", "whole", *SMALL))
    assert again["landed"]["digest"] == finished["landed"]["digest"]
    assert again["evaluation"] == finished["evaluation"]


def test_it_is_made_again_from_its_record(place: Path, finished: Any) -> None:
    assert forge_json("registry", "rebuild", "whole")["same"] is True


def test_what_is_there_is_kept(place: Path, tmp_path: Path) -> None:
    taken = forge(*words(place, tmp_path / "other", "base", *SMALL))
    assert taken.code == 1 and "--force" in taken.err and not (tmp_path / "other").exists()
    foreign = forge(*words(place, place / "s", "foreign", *SMALL))
    assert foreign.code == 1 and "another --output-dir" in foreign.err


def test_stage_by_stage_ends_with_the_same_model(place: Path, finished: Any, tmp_path: Path) -> None:
    staged = words(place, tmp_path / "staged", "staged", *SMALL)
    early = forge(*staged, "--only-apply")
    assert early.code == 2 and "--only-compute" in early.err
    computed = forge_json(*staged, "--only-compute")
    assert computed["choice"] and computed["output"] is None and Path(computed["directions"]).exists()
    assert forge(*staged, "--only-export").code == 2
    applied = forge_json(*staged, "--only-apply")
    assert Path(applied["output"]).exists() and applied["landed"] is None
    assert forge_json(*staged, "--only-export")["landed"]["name"] == "staged:latest"
    assert applied["sha256"] == finished["sha256"] == weights_digest(place / "s", "staged").removeprefix("sha256:")


def test_a_folder_of_another_family_lands_quantized(place: Path, tmp_path: Path) -> None:
    command = list(words(place, tmp_path / "w", "gemma", *SMALL))
    command[command.index("base")] = refuser("gemma2", tmp_path)
    result = forge_json(*command)
    before, after = (result["evaluation"][side]["harmful"] for side in ("against", "this"))
    assert before["refused"] == 8 and after["refused"] == 0 == after["degenerate"]
    assert forge_json("show", "gemma", "--store", place / "s")["quantization"] == "Q4_K_M"


def test_what_did_nothing_is_not_landed(place: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    rows = draw.normal(size=(3, 1, 256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    write_directions(tmp_path / "random.safetensors", Directions(rows, 1))
    command = words(place, tmp_path / "w", "idle", *SMALL, "--directions", tmp_path / "random.safetensors")
    ended = forge(*command)
    assert ended.code == 1 and "did nothing" in ended.err and "--accept" in ended.err
    assert forge("show", "idle", "--store", place / "s").code == 1
    accepted = forge_json(*command, "--accept")
    assert accepted["landed"] and any("did nothing" in text for text in accepted["warnings"])


def test_what_is_broken_is_not_landed(place: Path, tmp_path: Path) -> None:
    ended = forge(*words(place, tmp_path / "w", "broken", *SMALL, "--layer", "2", "--strength", "25"))
    assert ended.code == 1 and "broke the model" in ended.err
    assert forge("show", "broken", "--store", place / "s").code == 1


def test_what_cannot_work_is_said_before_the_work(place: Path, tmp_path: Path) -> None:
    swapped = list(words(place, tmp_path / "w", "new", *SMALL))
    one, other = swapped.index("--harmful"), swapped.index("--harmless")
    swapped[one], swapped[other] = swapped[other], swapped[one]
    ended = forge(*swapped)
    assert ended.code == 1 and "swapped" in ended.err
    assert forge("abliterate", "run", "--model", "base").code == 2
    for old, better in (("--llama-cpp-dir", "compiled"), ("--template-from", "--template")):
        refused = forge(*words(place, tmp_path / "w", "new"), old, "x")
        assert refused.code == 2 and better in refused.err
    planned = forge_json(*words(place, tmp_path / "planned", "new", "--dry-run"))
    assert planned["dry_run"] and planned["plan"]["prompts"]["harmful"]["computing"] == N_PROMPTS // 2
    source_bytes = planned["plan"]["source_bytes"]
    assert planned["plan"]["memory_bytes"] > source_bytes and planned["plan"]["disk_bytes"] >= source_bytes
    assert planned["plan"]["tokens"] > 0
    told = forge(*words(place, tmp_path / "planned", "new", "--dry-run"))
    assert "of memory and" in told.out and "Nothing was changed." in told.out
    assert "known after the first prompts" in told.out and planned["plan"]["seconds"] is None
    assert not (tmp_path / "planned").exists()


def test_a_model_that_is_abliterated_already_is_asked_and_landed(place: Path, tmp_path: Path) -> None:
    lists = ("--harmful", place / "harmful.txt", "--harmless", place / "harmless.txt", "--num-prompts", "2")
    arguments = ("abliterate", "run", "--from-checkpoint", DEMO_MODEL, "--name", "checked", "--store", place / "s")
    result = forge_json(*arguments, "--no-check", "--quant", "Q8_0", *lists)
    assert result["name"] == "checked:latest" and result["evaluation"]["this"]["harmful"]["refused"] == 2
    assert forge(*arguments, "--only-apply").code == 2


PREPARATION = """
import contextlib, io
import torch
torch.set_num_threads(1)
from ollama_forge.cli import main
import ollama_forge.cli.abliterate_run, ollama_forge.jobs.abliteration_run, ollama_forge.train.ablation_trials
import ollama_forge.train.scored_model, ollama_forge.train.directions, ollama_forge.train.direction_plot
"""
RUN = """
out = io.StringIO()
with contextlib.redirect_stdout(out):
    status = main([str(word) for word in {argv}])
assert status == 0, (status, out.getvalue())
"""
KILLED_AT = (0.3, 0.8)
TINY = (
    "--layer-fracs",
    "0.7",
    "--num-eval-prompts",
    "2",
    "--num-prompts",
    "2",
    "--trial-tokens",
    "8",
    "--max-tokens",
    "12",
)


def test_killed_anywhere_it_goes_on_to_the_same_model(place: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        root = tmp_path / name
        shutil.copytree(place / "s", root / "s")
        return root

    for name in ("harmful", "harmless"):
        first = (place / f"{name}.txt").read_text(encoding="utf-8").splitlines()[:8]
        (tmp_path / f"{name}.txt").write_text("\n".join(first) + "\n", encoding="utf-8")
    lists = f"'--harmful', {str(tmp_path / 'harmful.txt')!r}, '--harmless', {str(tmp_path / 'harmless.txt')!r}"
    argv = (
        f"['abliterate', 'run', '--model', 'base', '--name', 'killed', {lists}, '--output-dir', ROOT / 'w', '--store', "
        f"ROOT / 's', '--no-check', '--accept', *{list(TINY)!r}]"
    )
    code = RUN.format(argv=argv)
    whole = copy("whole")
    (ended,) = kill_forks(PREPARATION, code, [(whole, 0)])
    assert ended.returncode == 0, ended.stderr
    points = [round(share * ended.n_events) for share in KILLED_AT]
    roots = [copy(str(point)) for point in points]
    assert all(outcome.was_killed for outcome in kill_forks(PREPARATION, code, list(zip(roots, points, strict=True))))
    for root in roots:
        report = verify_store(open_store(root / "s"))
        assert report.is_whole, report.problems
    for root, again in zip(roots, kill_forks(PREPARATION, code, [(root, 0) for root in roots]), strict=True):
        assert again.returncode == 0, again.stderr
        assert made(root) == made(whole)


def made(root: Path) -> tuple[Any, ...]:
    """What a finished run leaves."""
    files = {
        path.name: path.read_bytes()
        for path in (root / "w").iterdir()
        if path.suffix in (".gguf", ".safetensors") or path.name == "run.json"
    }
    return files, weights_digest(root / "s", "killed"), sorted(path.name for path in (root / "w").iterdir())
