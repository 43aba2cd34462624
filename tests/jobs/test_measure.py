"""`measure` judged by llama.cpp (its perplexity tool's numbers, the engine's probabilities) and by plain sense."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import DEMO_MODEL, forge, forge_json
from measure_sources import CONTEXT, GOLDEN, TYPES, golden_text, write_base, write_quantized
from packed_sources import dense_model, write_gguf_of
from tiny_adapters import build_adapter
from tiny_models import build_model

from ollama_forge.dataset.windows import make_window
from ollama_forge.engine import Sampling, open_engine
from ollama_forge.errors import MissingExtraError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.jobs import measure_models
from ollama_forge.jobs.measure import built_in_text
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.train.scored_model import scored_model
from ollama_forge.train.scoring import score

ADAPTED = {"lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's model in float32 and in every type, and the text of the goldens."""
    folder = tmp_path_factory.mktemp("models")
    for type_name in TYPES:
        write_quantized(folder, type_name)
    (folder / "text.txt").write_text(golden_text(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    build_adapter(DEMO_MODEL, folder, spread=0.05, **ADAPTED)
    return folder


def measured(models: Path, name: str, *more: object, against: str = "base") -> Any:
    return forge_json(
        *("measure", models / f"{name}.gguf", "--against", models / f"{against}.gguf"),
        *("--text", models / "text.txt", "--context", CONTEXT, *more),
    )


def golden() -> dict[str, dict[str, float]]:
    lines = [line.split() for line in GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: {key: float(value) for key, value in (pair.split("=") for pair in pairs)} for name, *pairs in lines}


def test_a_model_beside_itself_differs_nowhere(models: Path) -> None:
    result = measured(models, "Q4_K_M", against="Q4_K_M")
    assert result["kl_divergence"]["max"] < 1e-6
    assert result["same_top"] == 1.0
    assert result["perplexity"]["this"] == result["perplexity"]["against"]


def test_less_precise_types_cost_more(models: Path) -> None:
    order = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # Q4_0 is of another series
    costs = [measured(models, name)["kl_divergence"] for name in order]
    for key in ("mean", "p99"):
        assert [cost[key] for cost in costs] == sorted(cost[key] for cost in costs)
    assert costs[0]["mean"] > 0


@pytest.mark.parametrize("name", TYPES)
def test_numbers_equal_those_of_llama_perplexity(name: str, models: Path) -> None:
    expected, base = golden()[name], golden()["base"]
    result = measured(models, name)
    assert result["perplexity"]["this"] == pytest.approx(expected["perplexity"], rel=0.02)
    assert result["perplexity"]["against"] == pytest.approx(base["perplexity"], rel=0.002)
    assert result["engine"] == "llama.cpp"
    for ours, theirs in (("mean", "kl_mean"), ("p99", "kl_p99"), ("max", "kl_max")):
        assert result["kl_divergence"][ours] == pytest.approx(expected[theirs], rel=0.02), ours
    assert 100 * result["same_top"] == pytest.approx(expected["same_top"], abs=0.5)


def engine_differences(path: Path) -> list[float]:
    """|our log-probability - the engine's| of each token of a conversation."""
    with open_gguf(path) as gguf:
        tokenizer = build_tokenizer(gguf.metadata)
        ids = tokenizer.encode("<|user|>What colour is the glimbel?<|end|><|assistant|>The glimbel is green.<|end|>")
        ids = [tokenizer.bos_id or 0, *ids]
        with scored_model(gguf) as packed:
            ours = score(packed, [make_window(ids)]).log_probs.tolist()
    one = Sampling(max_tokens=1, temperature=0.0)
    with open_engine(path, n_threads=1) as engine:
        said = [engine.generate(ids[:n], one, n_logprobs=engine.n_vocab).logprobs[0] for n in range(1, len(ids))]
    return [abs(mine - its.top[token]) for mine, its, token in zip(ours, said, ids[1:], strict=True)]


@pytest.mark.parametrize("name", ["base", "F16", "BF16"])
def test_log_probabilities_equal_the_engines(name: str, models: Path) -> None:
    path = models / "base.gguf" if name == "base" else write_quantized(models, name)
    assert max(engine_differences(path)) < 1e-2


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M"])
def test_of_quantized_models_log_probabilities_equal_the_engines_on_average(name: str, models: Path) -> None:
    """The engine keeps keys and values in 16 bits, which moves what is rounded to 8 bits afterwards."""
    differences = engine_differences(models / f"{name}.gguf")
    assert sum(differences) / len(differences) < 1e-2
    assert max(differences) < 0.1


def test_the_document_has_what_scripts_read(models: Path) -> None:
    result = measured(models, "Q2_K")
    assert set(result["perplexity"]) >= {"this", "against"}
    assert set(result["kl_divergence"]) >= {"mean", "median", "p99", "max"}
    assert (result["context"], result["windows"] * (CONTEXT // 2 - 1)) == (CONTEXT, result["tokens"])
    assert 0 <= result["left_out"] < CONTEXT
    worst = result["worst"]
    assert [place["kl_divergence"] for place in worst] == sorted(
        (place["kl_divergence"] for place in worst), reverse=True
    )
    assert worst[0]["kl_divergence"] == result["kl_divergence"]["max"]
    text = golden_text()
    assert all(place["before"] + place["token"] in text for place in worst if "\ufffd" not in place["token"])
    assert sum(bucket["tokens"] for bucket in result["positions"]) == result["tokens"]


def test_an_adapter_counts_as_if_it_were_merged(models: Path, adapter: Path, tmp_path: Path) -> None:
    base = models / "base.gguf"
    merged = tmp_path / "merged.gguf"
    forge_json("merge", base, adapter, "-o", merged)
    text = ("--text", models / "text.txt", "--exact")
    same = forge_json("measure", f"{base}+{adapter}", "--against", merged, *text)
    assert same["kl_divergence"]["max"] < 1e-6
    changed = forge_json("measure", f"{base}+{adapter}", "--against", base, *text)
    assert changed["kl_divergence"]["mean"] > 0.01
    again = forge_json("measure", merged, "--against", base, *text)
    assert again["kl_divergence"]["mean"] == pytest.approx(changed["kl_divergence"]["mean"], rel=1e-4)


def test_the_adapter_layer_of_an_ollama_model_counts(models: Path, adapter: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path)
    base = models / "Q8_0.gguf"
    forge_json("retrain", "--base", base, "--adapter", adapter, "--name", "tuned", "--no-check", *store)
    text = ("--text", models / "text.txt", *store)
    by_name = forge_json("measure", "tuned", "--against", base, *text)
    by_path = forge_json("measure", f"{base}+{adapter}", "--against", base, *text)
    borrowed = forge_json("measure", f"{base}+tuned", "--against", base, *text)
    assert by_name["kl_divergence"]["mean"] > 0.01
    assert by_name["kl_divergence"] == pytest.approx(by_path["kl_divergence"], rel=1e-3)
    assert by_name["kl_divergence"] == borrowed["kl_divergence"]


def test_a_folder_is_measured_as_it_would_be_converted(models: Path) -> None:
    text = ("--text", models / "text.txt", "--exact")
    result = forge_json("measure", DEMO_MODEL, "--against", models / "base.gguf", *text)
    assert result["kl_divergence"]["max"] < 1e-6


def test_prompts_and_answers_are_scored_in_the_chat_template(models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What colour is the glimbel?\nWhat does the quillow eat?\n", encoding="utf-8")
    pair = ("measure", models / "Q4_K_M.gguf", "--against", models / "base.gguf", "--prompts")
    assert forge_json(*pair, prompts)["windows"] == 2
    answered = tmp_path / "answered.jsonl"
    record = {"prompt": "What colour is the glimbel?", "completion": "The glimbel is green."}
    answered.write_text(json.dumps(record) + "\n", encoding="utf-8")
    result = forge_json(*pair, answered)
    assert result["perplexity"]["against"] < 1.05


def test_the_package_brings_a_text_of_its_own(models: Path) -> None:
    result = forge_json("measure", models / "Q8_0.gguf", "--against", models / "base.gguf")
    assert result["tokens"] > 500
    assert len(built_in_text()) > 5000


def test_the_page_is_one_file_without_links(models: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    measured(models, "Q2_K", "--html", page)
    content = page.read_text(encoding="utf-8")
    assert content.count("data:image/png;base64,") == 1
    assert "http" not in content
    assert "Where they differ most" in content
    again = forge("measure", models / "Q2_K.gguf", "--against", models / "base.gguf", "--html", page)
    assert again.code == 1
    assert "exists" in again.err or "already" in again.err


def test_people_read_the_numbers_and_the_worst_places(models: Path) -> None:
    ended = forge("measure", models / "Q2_K.gguf", "--against", models / "base.gguf", "--text", models / "text.txt")
    assert ended.code == 0
    for words in ("perplexity", "KL mean", "same top token", "PLACES", "Where they differ most"):
        assert words in ended.out


def test_different_vocabularies_are_refused_before_any_work(models: Path, tmp_path: Path) -> None:
    build_model("qwen2", tmp_path / "other")
    ended = forge("measure", tmp_path / "other", "--against", models / "base.gguf", "--json")
    assert ended.code == 2
    error = ended.document["error"]
    assert "different vocabularies" in error["what"]
    assert "token" in error["why"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "{short}"), "1 token"),
        (("--text", "{missing}"), "no text"),
        (("--text", "{binary}"), "not UTF-8"),
        (("--text", "{text}", "--prompts", "{text}"), "do not go together"),
        (("--context", "100000"), "more than the models were made for"),
        (("--prompts", "{missing}"), "no file"),
    ],
)
def test_bad_input_is_told_in_words(arguments: tuple[str, ...], words: str, models: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / f"{name}.txt" for name in ("short", "missing", "binary", "text")}
    places["short"].write_text("", encoding="utf-8")
    places["binary"].write_bytes(b"\xff\xfe\x00 not text")
    places["text"].write_text("Hello there.", encoding="utf-8")
    filled = [argument.format(**places) for argument in arguments]
    ended = forge("measure", models / "Q8_0.gguf", "--against", models / "base.gguf", *filled, "--json")
    assert ended.code in (1, 2)
    assert words in ended.document["error"]["what"]
    assert ended.document["error"]["next"]


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("{base}+{nothing}", "no adapter"),
        ("{base}+", "no adapter behind the plus"),
        ("{nothing}", "no file or folder"),
        ("{adapter}", "adapter"),
    ],
)
def test_a_ref_that_means_nothing_is_told_in_words(
    ref: str, words: str, models: Path, adapter: Path, tmp_path: Path
) -> None:
    filled = ref.format(base=models / "base.gguf", nothing=tmp_path / "nothing", adapter=adapter)
    ended = forge("measure", filled, "--against", models / "base.gguf", "--store", tmp_path, "--json")
    assert ended.code in (1, 2)
    assert words in ended.document["error"]["what"]


def test_a_model_without_a_tokenizer_cannot_be_given_a_text(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.F16)
    ended = forge("measure", path, "--against", path, "--json")
    assert ended.code == 1
    assert "tokenizer" in ended.document["error"]["what"]
    assert ended.document["error"]["next"]


def test_an_adapter_alone_is_no_model(models: Path, adapter: Path, tmp_path: Path) -> None:
    base = models / "base.gguf"
    forge_json("adapters", "convert", adapter, "--base", base, "-o", tmp_path / "lora.gguf")
    ended = forge("measure", tmp_path / "lora.gguf", "--against", base, "--json")
    assert ended.code == 1
    assert "no model that continues a text" in ended.document["error"]["what"]
    as_file = forge_json("measure", f"{base}+{tmp_path / 'lora.gguf'}", "--against", f"{base}+{adapter}", "--exact")
    assert as_file["kl_divergence"]["max"] < 1e-6


def test_a_path_with_a_plus_in_its_name_is_a_path(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    folder.mkdir()
    path = folder / "c+d.gguf"
    path.write_bytes((models / "Q8_0.gguf").read_bytes())
    result = forge_json("measure", path, "--against", models / "Q8_0.gguf", "--text", models / "text.txt")
    assert result["kl_divergence"]["max"] == 0


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "accelerate", "matplotlib"):
    sys.modules[name] = None
from ollama_forge.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_nothing_but_the_package_itself_is_needed(models: Path) -> None:
    pair = ("measure", str(models / "Q4_K_M.gguf"), "--against", str(models / "base.gguf"))
    argv = [sys.executable, "-c", WITHOUT_TORCH, *pair, "--text", str(models / "text.txt"), "--json"]
    bare = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    again = forge_json(*pair, "--text", models / "text.txt")
    assert bare["kl_divergence"] == again["kl_divergence"]
    for flag, words in (("--exact", "torch"), ("--html=page.html", "matplotlib")):
        ended = subprocess.run([*argv, flag], capture_output=True, check=False)
        assert ended.returncode == 1
        assert words in json.loads(ended.stdout)["error"]["what"]


def test_without_torch_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_models, "PACKAGES", ("a_package_that_nobody_has",))
    with pytest.raises(MissingExtraError, match="a_package_that_nobody_has"):
        measure_models.require_packages()


def test_the_source_of_the_goldens_is_written_the_same_every_time(models: Path, tmp_path: Path) -> None:
    assert write_base(tmp_path).read_bytes() == (models / "base.gguf").read_bytes()
