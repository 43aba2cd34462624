"""Which layers are adapted: what the plan counts from the header is what training writes, and nothing else is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command import forge, forge_json
from safetensors import safe_open
from tiny_models import build_model


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of three kinds, and two examples."""
    folder = tmp_path_factory.mktemp("targets")
    for kind in ("llama3", "gpt2", "qwen3_moe"):
        build_model(kind, folder / kind)
        forge_json("convert", folder / kind, "-o", folder / f"{kind}.gguf")
    talk = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    (folder / "data.jsonl").write_text(f"{json.dumps(talk)}\n" * 2)
    return folder


def words(here: Path, kind: str, work: Path, *more: object) -> list[object]:
    argv = ["finetune", "--data", here / "data.jsonl", "--base", here / f"{kind}.gguf", "--skip-retrain"]
    return [*argv, "--workdir", work, "--max-steps", "1", "--rank", "4", "--lr", "1e-2", *more]


def written_numbers(adapter: str) -> int:
    with safe_open(Path(adapter) / "adapter_model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


@pytest.mark.parametrize(
    ("kind", "targets", "experts_left"),
    [
        ("llama3", "", 0),
        ("llama3", "q_proj", 0),
        ("llama3", "model.layers.1.mlp.down_proj,self_attn.o_proj", 0),
        ("gpt2", "", 0),
        ("gpt2", "c_proj", 0),
        ("qwen3_moe", "", 24),
        ("qwen3_moe", "q_proj,experts.1.up_proj", 22),
        ("qwen3_moe", "down_proj", 16),
    ],
)
def test_the_plan_counts_what_training_then_trains(
    here: Path, tmp_path: Path, kind: str, targets: str, experts_left: int
) -> None:
    named = ("--target-modules", targets) if targets else ()
    planned = forge_json(*words(here, kind, tmp_path / "run", *named, "--dry-run"))
    done = forge_json(*words(here, kind, tmp_path / "run", *named))
    counts: list[Any] = [result["plan"]["trained_parameters"] for result in (planned, done)]
    assert counts == [written_numbers(done["adapter"])] * 2
    for result in (planned, done):
        assert result["plan"]["untrained_expert_matrices"] == experts_left
        notes = [text for text in result["warnings"] if "matrices of experts are not trained" in text]
        assert notes == ([notes[0]] if experts_left else []) and all(str(experts_left) in text for text in notes)


@pytest.mark.parametrize("target", ["nothing", "layers.99.q_proj", "mlp.q_proj", "lm_head", "norm"])
@pytest.mark.parametrize("mode", ["--dry-run", "--quiet"])
def test_a_target_that_is_no_layer_is_refused_before_any_work(
    here: Path, tmp_path: Path, target: str, mode: str
) -> None:
    ended = forge(*words(here, "llama3", tmp_path / "run", mode, "--target-modules", f"q_proj,{target}"))
    assert ended.code == 1 and f"no layer '{target}'" in ended.err and "k_proj" in ended.err
    assert not (tmp_path / "run").exists()
