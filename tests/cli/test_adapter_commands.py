"""`adapters`, `merge` and `retrain` as a person or a script sees them; killed anywhere, nothing half made is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import forge, forge_json, tree_hash
from kill import kill_forks
from tiny_adapters import build_adapter, change_adapter, change_tensors
from tiny_models import build_model

from ollama_forge.engine import Sampling, open_engine
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.catalog import open_store
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.verify import verify_store
from ollama_forge.weights.adapter import open_adapter


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as folder, as GGUF and in a store; two adapters for it and one for another family."""
    folder = tmp_path_factory.mktemp("adapters")
    build_model("llama2", folder / "base", hidden_size=256)
    forge_json("convert", folder / "base", "-o", folder / "base.gguf", "--quant", "Q8_0")
    forge_json(
        *("convert", "--gguf", folder / "base.gguf", "--name", "base", "--no-check", "--store", folder / "store"),
        *("--system", "Be brief.", "--param", "temperature=0"),
    )
    build_adapter(folder / "base", folder / "one", target_modules=["q_proj", "v_proj", "down_proj"])
    build_adapter(folder / "base", folder / "two", target_modules=["up_proj"], r=2, seed=3)
    build_model("gpt2", folder / "gpt2")
    build_adapter(folder / "gpt2", folder / "strange", target_modules=["c_attn"], fan_in_fan_out=True)
    return folder


@pytest.fixture
def store(home: Path, tmp_path: Path) -> Path:
    """A store of one's own that holds `base`."""
    shutil.copytree(home / "store", tmp_path / "store")
    return tmp_path / "store"


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {verdict["name"]: verdict["state"] for verdict in document["verdicts"]}


def test_check_says_what_it_looked_at(home: Path) -> None:
    report = forge_json("adapters", "check", home / "one", "--base", "base", "--store", home / "store")
    assert report["fits"] and not report["needs_merge"]
    states = verdicts(report)
    assert set(states) == {"family", "targets", "shapes", "rank", "numbers", "form", "tokenizer", "base name"}
    assert all(verdict["evidence"] for verdict in report["verdicts"])
    assert {states[name] for name in ("family", "targets", "shapes", "rank", "numbers", "form")} == {"ok"}
    told = forge("adapters", "check", home / "one", "--base", home / "base")
    assert told.code == 0 and "retrain --base" in told.err and "✓ shapes" in told.out


def test_what_our_own_training_left_is_read_back(home: Path, store: Path, tmp_path: Path) -> None:
    trained = tmp_path / "finetune-x"
    shutil.copytree(home / "one", trained / "adapter")
    change_adapter(trained / "adapter", {"base_model_name_or_path": "ollama://base:latest"})
    shutil.copyfile(home / "base.gguf", trained / "imatrix.gguf")
    words = ("adapters", "convert", trained / "adapter", "-o", tmp_path / "lora.gguf")
    assert forge_json(*words, "--store", store)["pairs"] == 6
    forge_json("retrain", "--base", "base", "--adapter", trained, "--name", "again", "--no-check", "--store", store)
    absent = forge(*words, "--force", "--store", tmp_path / "empty")
    assert absent.code == 1 and "base:latest" in absent.err


def test_check_ends_with_1_when_the_adapter_cannot_be_used(home: Path) -> None:
    ended = forge("adapters", "check", home / "strange", "--base", home / "base.gguf", "--json")
    assert ended.code == 1 and not ended.document["fits"]
    targets = next(verdict for verdict in ended.document["verdicts"] if verdict["name"] == "targets")
    assert targets["state"] == "differs" and "c_attn.lora_B" in targets["evidence"]


def test_check_finds_what_does_nothing_and_what_is_no_number(home: Path, tmp_path: Path) -> None:
    import numpy as np

    for value, fits in ((0.0, True), (np.nan, False)):
        shutil.copytree(home / "two", tmp_path / str(value))
        names = [f"model.layers.{layer}.mlp.up_proj.lora_B.weight" for layer in range(2)]
        change_tensors(tmp_path / str(value), {name: np.full((512, 2), value, np.float32) for name in names})
        ended = forge("adapters", "check", tmp_path / str(value), "--base", home / "base.gguf", "--json")
        assert ended.code == (0 if fits else 1)
        assert verdicts(ended.document)["numbers"] == "differs"


def test_check_compares_names_and_tokenizers(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "one", tmp_path / "a")
    tokenizer = json.loads((home / "base" / "tokenizer.json").read_text())
    size = max(token["id"] for token in tokenizer["added_tokens"]) + 10_000
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": size + n, "content": f"<{n}>"} for n in range(900)
    ]
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for name, state in (("org/base", "ok"), ("meta-llama/Llama-3.2-1B", "differs")):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        report = forge_json("adapters", "check", tmp_path / "a", "--base", home / "base")
        assert verdicts(report)["base name"] == state and verdicts(report)["tokenizer"] == "differs"


def test_convert_goes_both_ways_and_overwrites_nothing(home: Path, tmp_path: Path) -> None:
    base = ("--base", "base", "--store", home / "store")
    made = forge_json("adapters", "convert", home / "one", "-o", tmp_path / "a.gguf", *base)
    assert (made["pairs"], made["ranks"], made["alpha"]) == (6, [4], 6.0)
    assert made["bytes"] == (tmp_path / "a.gguf").stat().st_size
    again = forge("adapters", "convert", home / "one", "-o", tmp_path / "a.gguf", *base)
    assert again.code == 1 and "--force" in again.err
    forge_json("adapters", "convert", tmp_path / "a.gguf", "-o", tmp_path / "back", *base)
    again = forge("adapters", "convert", tmp_path / "a.gguf", "-o", tmp_path / "back", *base)
    assert again.code == 1 and "--force" in again.err
    small = forge_json(
        "adapters", "convert", tmp_path / "back", "-o", tmp_path / "a.gguf", "--force", "--outtype", "F16", *base
    )
    assert small["bytes"] < made["bytes"]
    planned = forge_json("adapters", "convert", tmp_path / "back", "-o", tmp_path / "b.gguf", "--dry-run", *base)
    assert planned["bytes"] == made["bytes"] and not (tmp_path / "b.gguf").exists()
    needs = forge("adapters", "convert", tmp_path / "a.gguf", "-o", tmp_path / "c")
    assert needs.code == 1 and "--base" in needs.err and not (tmp_path / "c").exists()


def test_merge_writes_a_model_and_says_what_it_cost(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    merged = forge_json(
        "merge", home / "base.gguf", home / "one", home / "two", "--weight", "1", "--weight", "0.5", "-o", out
    )
    assert merged["edited"] == 8 == len(merged["tensors"]) and merged["untouched"] > 5
    assert all(0.9 < tensor["survived"] < 1.1 and tensor["type"] == "Q8_0" for tensor in merged["tensors"])
    told = forge("merge", home / "base.gguf", home / "one", "-o", out, "--force")
    assert told.code == 0 and "SURVIVED" in told.out and "blk.0.attn_q.weight" in told.out
    folder = forge_json("merge", home / "base", home / "one", "-o", tmp_path / "folder")
    assert {tensor["type"] for tensor in folder["tensors"]} == {"BF16"}
    forge_json("convert", tmp_path / "folder", "-o", tmp_path / "f.gguf")


def test_words_that_do_not_go_together(home: Path, tmp_path: Path) -> None:
    base, one = home / "base.gguf", home / "one"
    for argv, says in (
        (("merge", base, one), "--name"),
        (("merge", base, one, "-o", tmp_path / "x.gguf", "--weight", "1", "--weight", "2"), "--weight"),
        (("merge", base, one, "-o", tmp_path / "x.gguf", "--weight", "nan"), "--weight"),
        (("merge", home / "base", one, "-o", tmp_path / "x", "--untie"), "--untie"),
        (("retrain", "--base", base, "--adapter", one, "--name", "x", "--untie"), "--merge"),
        (("adapters", "convert", one, "-o", tmp_path / "folder", "--base", base), "PEFT folder"),
    ):
        ended = forge(*argv)
        assert ended.code == 2 and says in ended.err, ended.err
    assert list(tmp_path.iterdir()) == []


def test_retrain_lands_a_layer_on_the_shared_base(home: Path, store: Path) -> None:
    landed = forge_json("retrain", "--base", "base", "--adapter", home / "one", "--name", "tuned", "--store", store)
    assert landed["check"]["loaded"]
    assert landed["written_bytes"] < 200_000 < landed["shared_bytes"]
    base, tuned = (open_store(store).find(name) for name in ("base", "tuned"))
    assert base.model_path == tuned.model_path and len(tuned.adapters) == 1 and tuned.system == "Be brief."
    with open_adapter(tuned.adapters[0]) as adapter:
        assert len(adapter.pairs) == 6
    second = forge_json(
        *("retrain", "--base", "tuned", "--adapter", home / "two", "--name", "twice", "--store", store, "--no-check")
    )
    assert second["written_bytes"] < 200_000 and len(open_store(store).find("twice").adapters) == 2


def test_the_layer_and_the_merged_form_mean_the_same(home: Path, store: Path) -> None:
    for name, more in (("layer", ()), ("merged", ("--merge",))):
        argv = ("retrain", "--base", "base", "--adapter", home / "one", "--name", name, "--store", store, "--no-check")
        landed = forge_json(*argv, *more)
        assert ("merged" in landed) == (name == "merged")
    merged = open_store(store).find("merged")
    assert merged.system == "Be brief." and not merged.adapters
    assert merged.model_path != open_store(store).find("base").model_path
    base, layer, whole = (first_logprobs(open_store(store).find(name)) for name in ("base", "layer", "merged"))
    assert distance(layer, whole) < 0.25 * distance(layer, base)
    assert distance(layer, base) > 0.3


def first_logprobs(model: InstalledModel) -> dict[int, float]:
    """What the engine gives every token to follow a prompt, the model's adapter layers applied."""
    assert model.model_path is not None
    adapters = [(path, 1.0) for path in model.adapters]
    with open_engine(model.model_path, adapters=adapters, context_length=64, n_threads=1) as engine:
        said = engine.generate([40, 50, 60, 70], Sampling(max_tokens=1, temperature=0.0), n_logprobs=engine.n_vocab)
    return dict(said.logprobs[0].top)


def distance(one: dict[int, float], two: dict[int, float]) -> float:
    """Mean difference of two tables of log-probabilities."""
    return sum(abs(one[token] - two[token]) for token in one) / len(one)


def test_layers_that_a_base_has_already_are_merged_too(home: Path, store: Path, tmp_path: Path) -> None:
    forge_json(
        *("retrain", "--base", "base", "--adapter", home / "one", "--name", "tuned", "--store", store, "--no-check")
    )
    both = forge_json("merge", "tuned", home / "two", "-o", tmp_path / "a.gguf", "--store", store)
    once = forge_json("merge", home / "base.gguf", home / "one", home / "two", "-o", tmp_path / "b.gguf")
    assert both["sha256"] == once["sha256"]
    landed = forge_json("merge", "tuned", home / "two", "--name", "whole", "--store", store, "--no-check")
    assert not open_store(store).find("whole").adapters
    assert landed["merged"]["tensors"] == once["tensors"]


def test_a_gguf_file_is_a_base_too_and_old_files_are_adapters(home: Path, store: Path, tmp_path: Path) -> None:
    forge_json("adapters", "convert", home / "two", "-o", tmp_path / "two.gguf", "--base", home / "base.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "two.gguf").rename(tmp_path / "out" / "lora.bin")
    for adapter in (tmp_path / "out", tmp_path / "out" / "lora.bin"):
        forge_json(
            *("retrain", "--base", home / "base.gguf", "--adapter", adapter, "--name", "g", "--store", store),
            *("--no-check", "--force"),
        )
        assert len(open_store(store).find("g").adapters) == 1


@pytest.mark.parametrize("more", [(), ("--merge",)])
@pytest.mark.parametrize("base", ["base", "FOLDER"])
def test_an_adapter_for_another_family_lands_nothing(base: str, more: tuple[str, ...], home: Path, store: Path) -> None:
    before = tree_hash(store)
    ref = home / "base" if base == "FOLDER" else base
    ended = forge("retrain", "--base", ref, "--adapter", home / "strange", "--name", "x", "--store", store, *more)
    assert ended.code == 1 and "c_attn.lora_B.weight" in ended.err and "next:" in ended.err
    assert "Traceback" not in ended.err and tree_hash(store) == before


def test_a_layer_that_would_lose_something_is_refused_and_merging_offered(
    home: Path, store: Path, tmp_path: Path
) -> None:
    build_adapter(home / "base", tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    before = tree_hash(store)
    argv = ("retrain", "--base", "base", "--adapter", tmp_path / "a", "--name", "x", "--store", store, "--no-check")
    ended = forge(*argv)
    assert ended.code == 1 and "lora_magnitude_vector" in ended.err and "--merge" in ended.err
    assert tree_hash(store) == before
    forge_json(*argv, "--merge")
    report = forge_json("adapters", "check", tmp_path / "a", "--base", home / "base.gguf")
    assert report["fits"] and report["needs_merge"]


def test_a_dry_run_lands_and_writes_nothing(home: Path, store: Path, tmp_path: Path) -> None:
    before = tree_hash(store)
    for more in ((), ("--merge",)):
        argv = ("retrain", "--base", "base", "--adapter", home / "one", "--name", "x", "--store", store, "--dry-run")
        assert forge_json(*argv, *more)["dry_run"]
    planned = forge_json("merge", "base", home / "one", "-o", tmp_path / "m.gguf", "--dry-run", "--store", store)
    assert planned["dry_run"] and planned["edited"] == 6 and not (tmp_path / "m.gguf").exists()
    assert tree_hash(store) == before


KILLED = {
    "adapters": '["adapters", "convert", ROOT / "two", "-o", ROOT / "new.gguf", "--base", ROOT / "base.gguf"]',
    "back": '["adapters", "convert", ROOT / "two.gguf", "-o", ROOT / "new", "--base", ROOT / "base.gguf"]',
    "merge": '["merge", ROOT / "base.gguf", ROOT / "two", "-o", ROOT / "new.gguf", "--threads", "1"]',
    "folder": '["merge", ROOT / "base", ROOT / "two", "-o", ROOT / "new", "--force"]',
    "land": '["retrain", "--base", ROOT / "base.gguf", "--adapter", ROOT / "two", "--name", "new", "--merge", '
    '"--no-check", "--threads", "1", "--store", ROOT / "store"]',
    "layer": '["retrain", "--base", "base", "--adapter", ROOT / "two", "--name", "new", "--no-check", '
    '"--store", ROOT / "store"]',
}
N_KILLS = 8


@pytest.mark.parametrize("command", list(KILLED))
def test_killed_anywhere_the_command_can_be_run_again(command: str, home: Path, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("base", "two", "store"):
        shutil.copytree(home / name, origin / name)
    shutil.copy(home / "base.gguf", origin)
    forge_json("adapters", "convert", home / "two", "-o", origin / "two.gguf", "--base", home / "base.gguf")
    if command == "folder":
        shutil.copytree(origin / "base", origin / "new")  # something that --force replaces
    preparation = "import contextlib, io\nfrom ollama_forge.cli import main"
    code = quietly(KILLED[command])
    whole = tmp_path / "whole"
    shutil.copytree(origin, whole)
    (outcome,) = kill_forks(preparation, code, [(whole, 0)])
    assert outcome.returncode == 0, outcome.stderr
    wanted = result_of(whole)
    step = max(1, outcome.n_events // N_KILLS)
    runs = []
    for number in range(1, outcome.n_events + 1, step):
        root = tmp_path / f"{number}" / "origin"
        shutil.copytree(origin, root)
        runs.append((root, number))
    for (root, _), killed in zip(runs, kill_forks(preparation, code, runs), strict=True):
        assert killed.was_killed
        if (root / "new.gguf").exists():  # whole, or not there
            assert result_of(root) == wanted
        assert verify_store(open_store(root / "store")).is_whole
    again = [(root, 0) for root, _ in runs]
    retry = code if command == "folder" else quietly(KILLED[command][:-1] + ', "--force"]')
    for (root, _), ended in zip(again, kill_forks(preparation, retry, again), strict=True):
        assert ended.returncode == 0, ended.stderr
        assert result_of(root) == wanted
        assert not [path for path in root.rglob("*") if ".forge-" in path.name]


def quietly(words: str) -> str:
    """A program that runs the command and leaves stdout to `kill_forks`."""
    return f"with contextlib.redirect_stdout(io.StringIO()):\n    assert main([str(word) for word in {words}]) == 0"


def result_of(root: Path) -> Any:
    """What the command made: the bytes of its files, or what is landed."""
    made = [path for name in ("new", "new.gguf") if (root / name).exists() for path in [root / name]]
    if not made:
        model = open_store(root / "store").find("new")
        assert model.model_path is not None
        with open_gguf(model.model_path) as file:
            return model.digest, list(file.tensors)
    files = [path for item in made for path in ([item] if item.is_file() else sorted(item.rglob("*")))]
    return {path.name: path.read_bytes() for path in files}
