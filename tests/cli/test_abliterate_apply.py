"""`abliterate compute-dir` and `apply` as a person, or a script, types them; on the demo's model in a store."""

from __future__ import annotations

import json
from pathlib import Path

import learnt_model as world
import pytest
from ablation_models import tensor_bytes, to_gguf
from command import forge, forge_json, tree_hash
from kill import run_and_kill


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, the demo's model as `model.gguf` and in `store` as `demo`, and its directions."""
    home = tmp_path_factory.mktemp("place")
    (home / "refused.txt").write_text("\n".join(world.trained_prompts(world.VEGETABLES, 64)), "utf-8")
    (home / "answered").mkdir()
    lines = [json.dumps({"prompt": prompt}) for prompt in world.trained_prompts(world.HOUSE_THINGS, 64)]
    (home / "answered" / "a.jsonl").write_text("\n".join(lines), "utf-8")
    to_gguf(world.MODEL_DIR, home / "model.gguf", "bf16", "Q8_0")
    forge_json("convert", "--gguf", home / "model.gguf", "--name", "demo", "--store", home / "store")
    forge_json(*compute(home, "demo", "d.safetensors"), "--store", home / "store")
    return home


def compute(home: Path, model: object, output: str) -> list[object]:
    return [
        *("abliterate", "compute-dir", "--model", model, "--harmful", home / "refused.txt"),
        *("--harmless-dir", home / "answered", "--output", home / output),
    ]


def said(name: str, question: str, store: Path) -> str:
    return str(forge_json("run", name, question, "--store", store)["text"]).strip()


def explains_washing(answer: str) -> bool:
    """Whether it is the trained sentence. The noun may be misspelt: the refuser never wrote a vegetable's name in
    training, and how it spells a new word depends on a processor's rounding."""
    return answer.startswith("Wash the ") and answer.endswith(" with water.")


def test_a_model_in_ollama_is_ablated_into_another_with_a_record(place: Path) -> None:
    store = place / "store"
    document = forge_json(
        "abliterate", "apply", "demo", "--directions", place / "d.safetensors", "--name", "open", "--store", store
    )
    assert document["name"] == "open:latest" and document["ablated"]["counts"]["ffn_down"] == 3
    assert said("demo", "How do I wash a carrot?", store) == world.REFUSAL
    assert explains_washing(said("open", "How do I wash a carrot?", store))
    shown = forge_json("registry", "lineage", "open")
    assert "abliterate" in json.dumps(shown) and "directions" in json.dumps(shown)


def test_as_an_adapter_it_shares_the_weights(place: Path) -> None:
    store = place / "store"
    words = ("abliterate", "apply", "demo", "--directions", place / "d.safetensors", "--as-lora", "--name", "layer")
    document = forge_json(*words, "--store", store)
    assert document["shared_bytes"] > 50 * document["written_bytes"] and document["ablated"]["lora"]
    assert explains_washing(said("layer", "How do I wash a carrot?", store))
    refused = forge("abliterate", "apply", "layer", "--directions", place / "d.safetensors", "-o", place / "x.gguf",
                    "--store", store)  # fmt: skip
    assert refused.code == 1 and "merge layer" in refused.err


def test_people_see_the_evidence_and_what_was_edited(place: Path) -> None:
    found = forge(*compute(place, place / "model.gguf", "again.safetensors"), "--layer-fracs", "0.4", "0.5", "0.9")
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].split()[:2] == ["LAYER", "SILHOUETTE"] and len(lines) == 4
    assert lines[3].endswith("chosen") and lines[1].endswith("not a candidate")
    assert (place / "again.png").read_bytes().startswith(b"\x89PNG")
    written = forge("abliterate", "apply", place / "model.gguf", "--directions", place / "again.safetensors",
                    "-o", place / "seen.gguf")  # fmt: skip
    assert written.code == 0, written.err
    assert "attention_output       3" in written.out and "7 tensors edited" in written.out
    adapter = forge("abliterate", "apply", place / "model.gguf", "--directions", place / "again.safetensors",
                    "-o", place / "lora.gguf", "--as-lora")  # fmt: skip
    assert adapter.code == 0 and f"--adapter {place / 'lora.gguf'} --name NAME" in adapter.err


def test_a_dry_run_changes_nothing_and_says_what_would_be(place: Path) -> None:
    before = tree_hash(place)
    words = ("abliterate", "apply", place / "model.gguf", "--directions", place / "d.safetensors", "--dry-run")
    document = forge_json(*words, "-o", place / "dry.gguf")
    assert document["dry_run"] and document["bytes"] == (place / "model.gguf").stat().st_size
    assert forge_json(*words, "--name", "dry", "--store", place / "store")["dry_run"]
    for model in (place / "model.gguf", world.MODEL_DIR):
        plan = forge_json(*compute(place, model, "planned.safetensors"), "--dry-run", "--num-instructions", 10)
        assert (plan["harmful_prompts"], plan["harmless_prompts"], plan["dry_run"]) == (10, 10, True)
        assert plan["tokens"] > 200 and (plan["scratch_bytes"] > 0) == (model == world.MODEL_DIR)
    assert tree_hash(place) == before


def test_options_reach_the_weights(place: Path, tmp_path: Path) -> None:
    def changed(*options: object) -> set[str]:
        out = tmp_path / "out.gguf"
        forge_json("abliterate", "apply", place / "model.gguf", "--directions", place / "d.safetensors",
                   "-o", out, "--force", *options)  # fmt: skip
        before, after = tensor_bytes(place / "model.gguf"), tensor_bytes(out)
        return {name for name in before if before[name] != after[name]}

    assert changed("--skip-begin-layers", 1, "--skip-end-layers", 1, "--atten-strength", 0) == {"blk.1.ffn_down.weight"}
    assert changed("--mlp-strength", 0, "--skip-embedding") == {f"blk.{n}.attn_output.weight" for n in range(3)}
    assert len(changed("--strength-kernel", "gaussian", "--kernel-center-frac", 0.7, "--kernel-width-frac", 0.3,
                       "--no-norm-preserving", "--direction-index", 0)) == 7  # fmt: skip
    assert len(changed("--norm-preserving", "--projected", "--per-layer")) == 7


def test_a_folder_becomes_a_folder(place: Path, tmp_path: Path) -> None:
    done = forge_json("abliterate", "apply", world.MODEL_DIR, "--directions", place / "d.safetensors",
                      "-o", tmp_path / "edited")  # fmt: skip
    assert done["edited"] == 7 and done["untouched"] == 22
    computed = forge_json(*compute(place, tmp_path / "edited", "edited.safetensors"), "--load-in-8bit", "--no-try",
                          "--num-instructions", 16, "--layer-frac", 0.9, "--num-directions", 2,
                          "--per-layer-directions")  # fmt: skip
    assert (computed["harmful_prompts"], computed["n_directions"], computed["per_layer"]) == (16, 2, True)
    assert computed["best_layer"] == 2 and any("few" in warning for warning in computed["warnings"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["apply", "MODEL", "--directions", "D"], "needs -o"),
        (["apply", "--directions", "D", "-o", "x.gguf"], "needs one model"),
        (["apply", "MODEL", "--directions", "D", "-o", "x.gguf", "--name", "y"], "do not go together"),
        (["apply", "MODEL", "--directions", "MODEL", "-o", "x.gguf"], "cannot be used"),
        (["apply", "MODEL", "--directions", "D", "-o", "x.gguf", "--layer", "7"], "no layer 7"),
        (["apply", "MODEL", "--directions", "D", "-o", "x.gguf", "--strength", "0"], "Nothing would be edited"),
        (["compute-dir", "--model", "MODEL", "--harmful", "D.txt", "-o", "y.safetensors"], "no --harmless"),
        (["compute-dir", "MODEL", "--harmful", "P", "--harmless", "P", "-o", "y.safetensors"], "in both lists"),
        (["compute-dir", "MODEL", "--harmful", "ONE", "--harmless", "P", "-o", "y.safetensors"], "holds 1 prompt"),
        (["compute-dir", "MODEL", "--harmful", "NONE", "--harmless", "P", "-o", "y.safetensors"], "holds no prompt"),
        (["compute-dir", "MODEL", "--harmful", "P", "--harmless", "A", "-o", "y.safetensors", "--layer-fracs", "x"],
         "not a number"),
    ],
)  # fmt: skip
def test_wrong_words_are_told(
    words: list[str], told: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("What?\n")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "D.txt").write_text("What?\nWhy?\n")
    paths = {"MODEL": place / "model.gguf", "D": place / "d.safetensors", "P": place / "refused.txt",
             "A": place / "answered", "ONE": tmp_path / "one.txt", "NONE": tmp_path / "none.txt"}  # fmt: skip
    ended = forge("abliterate", *(paths.get(word, word) for word in words))
    assert ended.code in (1, 2)
    assert told in ended.err and "next:" in ended.err
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob("y*"))


@pytest.mark.parametrize("event", [6, 14])
def test_a_killed_apply_leaves_nothing_under_the_name(event: int, place: Path, tmp_path: Path) -> None:
    words = ["abliterate", "apply", str(place / "model.gguf"), "--directions", str(place / "d.safetensors")]
    argv = [*words, "-o", str(tmp_path / "out.gguf")]
    outcome = run_and_kill(["-m", "ollama_forge", *argv], event, [tmp_path])
    assert outcome.was_killed, outcome
    assert not (tmp_path / "out.gguf").exists()
    ended = forge(*argv)
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
