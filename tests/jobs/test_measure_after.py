"""`quantize --measure` and `merge --measure` say what the step cost, and the registry keeps the scores of a landing."""

from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from measure_sources import golden_text, write_base, write_quantized
from tiny_adapters import build_adapter

from ollama_forge.registry.registry_file import find_registry, read_registry

MEASURED = {"perplexity", "kl_divergence", "same_top", "tokens", "this", "against"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def q8(base: Path) -> Path:
    return write_quantized(base.parent, "Q8_0")


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base.parent / "text.txt"
    path.write_text(golden_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    build_adapter(DEMO_MODEL, folder, spread=0.05, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    return folder


def test_quantize_says_what_it_cost(base: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.gguf"
    result = forge_json(
        *("quantize", base, "-o", output, "--type", "Q4_K_M", "--measure", "--measure-text", text),
    )
    found = result["measured"]
    assert set(found) >= MEASURED
    again = forge_json("measure", output, "--against", base, "--text", text)
    assert found["kl_divergence"] == again["kl_divergence"]
    assert result["output"] == str(output)
    told = forge("quantize", base, "-o", output, "--type", "Q2_K", "--measure", "--measure-text", text, "--force")
    assert "KL divergence" in told.out


def test_without_the_flag_nothing_is_measured(base: Path, tmp_path: Path) -> None:
    assert "measured" not in forge_json("quantize", base, "-o", tmp_path / "small.gguf", "--type", "Q4_0")
    dry = forge_json("quantize", base, "-o", tmp_path / "dry.gguf", "--type", "Q4_0", "--measure", "--dry-run")
    assert "measured" not in dry


def test_a_text_without_the_flag_or_that_is_not_there_is_refused_before_the_work(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.gguf"
    for extra in (("--measure-text", base), ("--measure", "--measure-text", tmp_path / "none.txt")):
        ended = forge("quantize", base, "-o", output, "--type", "Q4_0", *extra, "--json")
        assert ended.code == 2
        assert not output.exists()


def test_a_merge_is_measured_against_the_base_with_its_adapter_on(
    q8: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged.gguf"
    flags = ("--measure", "--measure-text", text)
    stored = forge_json("merge", q8, adapter, "-o", output, *flags)["measured"]
    assert stored["against"] == f"{q8}+{adapter}"
    changed = forge_json("measure", output, "--against", q8, "--text", text)
    assert 0 < stored["kl_divergence"]["mean"] < 0.1 * changed["kl_divergence"]["mean"]
    half = forge_json("merge", q8, adapter, "-o", tmp_path / "half.gguf", "--weight", "0.5", *flags)["measured"]
    assert 0 < half["kl_divergence"]["mean"] < 0.1 * changed["kl_divergence"]["mean"]


def test_an_adapter_that_only_a_merge_can_express_is_measured_against_the_base_alone(
    base: Path, text: Path, tmp_path: Path
) -> None:
    build_adapter(DEMO_MODEL, tmp_path / "dora", spread=0.05, use_dora=True, target_modules=["q_proj"])
    result = forge_json(
        *("merge", base, tmp_path / "dora", "-o", tmp_path / "merged.gguf", "--measure", "--measure-text", text)
    )["measured"]
    assert result["against"] == str(base)
    assert any("without its adapters" in warning for warning in result["warnings"])
    assert result["kl_divergence"]["mean"] > 0


def test_the_registry_keeps_the_scores_of_a_landed_merge(
    q8: Path, adapter: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    result = forge_json(
        *("merge", q8, adapter, "--name", "merged", "--no-check", "--store", tmp_path / "models"),
        *("--measure", "--measure-text", text),
    )
    document = read_registry(find_registry())
    scores = document.lineage[f"sha256:{result['digest']}"][-1].scores
    assert scores["kl_mean"] == result["measured"]["kl_divergence"]["mean"]
    assert scores["perplexity"] == result["measured"]["perplexity"]["this"]
    entries = [entry for entry in document.models.values() if entry.identity.manifest_digest.endswith(result["digest"])]
    assert entries and all(entry.scores["same_top"] == scores["same_top"] for entry in entries)
