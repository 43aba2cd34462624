"""The fit light: its parts are the sums that the jobs themselves go by, and it turns where the numbers say."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json

from ollama_forge.arch.kv_cache import kv_cache_bytes
from ollama_forge.dataset.examples import Source
from ollama_forge.dataset.tokenize import Tokenized, TokenizedDataset
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, plan_layout, string, uint32
from ollama_forge.jobs.fit import Fit, Machine, fit_finetune, fit_model, fit_run, fit_stream, usual_context
from ollama_forge.jobs.model_fits import fit_ref, fits_of_store
from ollama_forge.jobs.training_plan import plan_training, training_memory
from ollama_forge.train.options import LoopOptions, LoraOptions

ROOMY = Machine(64 << 30)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fit") / "m.gguf"
    forge_json("convert", DEMO_MODEL, "-o", target)
    return target


@pytest.fixture
def gguf(path: Path) -> Iterator[GGUFFile]:
    with open_gguf(path) as opened:
        yield opened


def test_a_light_turns_with_the_memory_that_is_free(gguf: GGUFFile) -> None:
    needed = fit_run(gguf, ROOMY).needed_bytes
    lights = [fit_run(gguf, Machine(int(needed * share))).light for share in (2.0, 1.2, 1.0, 0.5)]
    assert lights == ["green", "yellow", "red", "red"]
    assert fit_run(gguf, Machine(None)).light == "unknown"


def test_running_takes_the_file_the_context_and_a_batch(gguf: GGUFFile) -> None:
    fit = fit_run(gguf, ROOMY, 512)
    assert fit.parts["weights"] == gguf.path.stat().st_size
    assert fit.parts["context"] == kv_cache_bytes(gguf, 512)
    assert fit_run(gguf, ROOMY, 8192).needed_bytes > fit.needed_bytes
    assert usual_context(gguf) == gguf.arch_value("context_length") and usual_context(gguf, 64) == 64


def test_fine_tuning_goes_by_the_sums_of_the_training_plan(gguf: GGUFFile) -> None:
    fit = fit_finetune(gguf, ROOMY, length=64, lora=LoraOptions(rank=4))
    assert dict(fit.parts) == training_memory(gguf, LoraOptions(rank=4), 64)
    assert fit_finetune(gguf, ROOMY, length=512).needed_bytes > fit.needed_bytes


def row_of(n_tokens: int) -> Tokenized:
    ids = array("q", [5]) * n_tokens
    return Tokenized(ids, ids, Source(Path("data.jsonl"), 1))


def test_activations_that_fit_into_the_spared_room_cost_nothing_more(gguf: GGUFFile) -> None:
    lora = LoraOptions(rank=4)
    for n_positions, is_more in ((64, False), (200_000, True)):
        spared = sum(training_memory(gguf, lora, n_positions, True).values())
        kept = sum(training_memory(gguf, lora, n_positions, False).values())
        assert (kept > spared) is is_more
    long = tuple(row_of(200_000) for _ in range(2))
    dataset = TokenizedDataset(long, 0, {}, {}, 400_000, 400_000, 200_000)
    plan = plan_training("base", gguf, dataset, None, lora, LoopOptions(batch_size=1), Path("run"))
    for free, is_said in ((10 * plan.unspared_bytes, True), (plan.unspared_bytes, False), (None, False)):
        assert dataclasses.replace(plan, available_bytes=free).is_sparing_for_nothing is is_said
    short = plan_training(
        "base",
        gguf,
        dataclasses.replace(dataset, rows=(row_of(8),)),
        None,
        lora,
        LoopOptions(batch_size=1),
        Path("run"),
    )
    assert not dataclasses.replace(short, available_bytes=1 << 50).is_sparing_for_nothing


def test_what_fits_on_the_card_is_judged_by_the_card(gguf: GGUFFile) -> None:
    assert not fit_run(gguf, ROOMY).on_gpu
    beside_card = dataclasses.replace(ROOMY, gpu_bytes=8 << 30)
    assert fit_run(gguf, beside_card).on_gpu and fit_run(gguf, beside_card).available_bytes == 8 << 30
    assert not fit_run(gguf, dataclasses.replace(ROOMY, gpu_bytes=1 << 20)).on_gpu
    assert not fit_stream("quantize", gguf, beside_card).on_gpu


def test_every_job_of_a_known_family_has_a_light_and_numbers(gguf: GGUFFile) -> None:
    fits = fit_model(gguf, ROOMY)
    assert set(fits) == {"run", "quantize", "finetune", "abliterate", "downsize"}
    assert all(fit.light == "green" and fit.needed_bytes > 0 for fit in fits.values())
    document = fits["finetune"].document()
    assert document["needed_bytes"] == sum(document["parts"].values()) and document["available_bytes"] == 64 << 30


def test_a_large_model_is_judged_from_its_header_alone(tmp_path: Path) -> None:
    """A sparse file of 11 GB stands for a model of 5 billion parameters."""
    layers, width, inner, words = 40, 5120, 20480, 50_000
    shapes = {"token_embd.weight": (words, width)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.attn_q.weight": (width, width), f"blk.{layer}.ffn_up.weight": (inner, width)}
    fields = [
        string("general.architecture", "llama"),
        uint32("general.file_type", 1),
        *(uint32(f"llama.{key}", value) for key, value in {
            "block_count": layers, "embedding_length": width, "feed_forward_length": inner,
            "attention.head_count": 40, "attention.head_count_kv": 8, "context_length": 131072,
        }.items()),
    ]  # fmt: skip
    layout = plan_layout(fields, [TensorEntry(name, shape, GGMLType.F16, lambda: []) for name, shape in shapes.items()])
    file = tmp_path / "large.gguf"
    with file.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size_bytes)
    with open_gguf(file) as large:
        fits = fit_model(large, Machine(8 << 30))
        assert fits["run"].light == "red" and fits["quantize"].light == "green"
        assert fits["run"].parts["context"] == 2 * 2 * layers * 8 * (width // 40) * 4096
        assert fit_run(large, ROOMY, 131072).parts["context"] == 32 * fits["run"].parts["context"]


def test_a_family_that_cannot_be_trained_has_a_light_for_running_only(tmp_path: Path) -> None:
    fields = [
        string("general.architecture", "novel"),
        *(uint32(f"novel.{key}", 2) for key in ("block_count", "embedding_length", "attention.head_count")),
    ]
    layout = plan_layout(fields, [TensorEntry("token_embd.weight", (4, 2), GGMLType.F32, lambda: [])])
    file = tmp_path / "novel.gguf"
    with file.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size_bytes)
    with open_gguf(file) as novel:
        assert set(fit_model(novel, ROOMY)) == {"run", "quantize"}


def test_the_models_of_a_store_are_listed_with_true_parameters_and_a_broken_one_is_named(tmp_path: Path) -> None:
    store = tmp_path / "store"
    forge_json("import", DEMO_MODEL, "--name", "good", "--quant", "Q8_0", "--no-check", "--store", store)
    forge_json("import", DEMO_MODEL, "--name", "bad", "--quant", "Q4_0", "--no-check", "--store", store)
    blob = next(Path(row["blob"]) for row in forge_json("list", "--store", store) if row["name"] == "bad:latest")
    blob.write_bytes(b"not a gguf, but long enough to be looked at")
    rows = {row.name: row for row in fits_of_store(store, ROOMY)}
    good = rows["good:latest"]
    assert (good.parameters, good.quantization) == (1_345_280, "Q8_0") and good.fits["run"].light == "green"
    assert not rows["bad:latest"].fits and "not a GGUF" in rows["bad:latest"].problem
    assert good.suggestion == "good-mine" and good.is_quantized
    folder = fit_ref(str(DEMO_MODEL), store, ROOMY)
    assert not folder.is_gguf and folder.size_bytes > 1_000_000
    assert isinstance(fit_ref("good", store, ROOMY).fits["run"], Fit)
