"""A GGUF becomes a folder that transformers loads and that converts back: same tensors, same tokens, same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from test_logits import LONGER_THAN_THE_WINDOW, SHORT, assert_agreement, random_prompts, reference_logprobs
from tiny_models import KINDS, build_model

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.convert.to_hf import HFFolder, HFOptions, plan_hf_folder, write_hf_folder
from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.errors import ForgeError, GGUFError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import FileType, GGMLType
from ollama_forge.gguf.writer import Field, TensorEntry, copy_entry, from_reader, string, write_gguf
from ollama_forge.weights.checkpoint import open_checkpoint

TEXTS = (
    "Hello, world!  It's 12345 o'clock.\n\n",
    "<s>Größe</s> 今日は🚀",
    "<|im_start|>user\nHi<|im_end|>",
    " a\tb  c ",
)


def convert(folder: Path, out: Path, outtype: str = "auto", quantize: QuantizeOptions | None = None) -> Path:
    options = ConvertOptions(outtype=outtype, quantize=quantize, name="tiny")
    with plan_conversion(folder, options) as conversion, atomic_output(out) as sink:
        write_gguf(sink, conversion.fields, conversion.entries)
    return out


def export(gguf_path: Path, folder: Path, **options: Any) -> HFFolder:
    folder.mkdir()
    with open_checkpoint(gguf_path) as checkpoint:
        plan = plan_hf_folder(checkpoint, HFOptions(**options))
        write_hf_folder(plan, folder)
    return plan


def plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else list(value)


def metadata_of(gguf: GGUFFile) -> dict[str, Any]:
    return {key: plain(gguf.metadata[key]) for key in gguf.metadata}


def assert_same_gguf(first: Path, second: Path) -> None:
    with open_gguf(first) as one, open_gguf(second) as two:
        assert {name: (t.shape, t.type) for name, t in one.tensors.items()} == {
            name: (t.shape, t.type) for name, t in two.tensors.items()
        }
        for name in one.tensors:
            assert bytes(one.read(name)) == bytes(two.read(name)), name
        before, after = metadata_of(one), metadata_of(two)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert not changed, {key: (before.get(key), after.get(key)) for key in changed}


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    import torch

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name)
                found[name] = (
                    str(tensor.dtype),
                    tuple(tensor.shape),
                    tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


def assert_same_tokens(folder: Path, gguf_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open_engine(gguf_path, context_length=64, n_threads=1) as engine:
        for text in TEXTS:
            assert tokenizer.encode(text, add_special_tokens=False) == engine.tokenize(text), text
        for text in ("", "Hello"):
            assert tokenizer.encode(text) == engine.tokenize(text, add_special=True), text
    with open_gguf(gguf_path) as gguf:
        template = gguf.metadata.get("tokenizer.chat_template")
    assert tokenizer.chat_template == template


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gemma3_vision", "gemma3_json")])
def test_the_folder_says_what_the_engine_says_and_converts_back(kind: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path / "model")
    gguf_path = convert(tmp_path / "model", tmp_path / "one.gguf", "f32")
    (tmp_path / "back").mkdir()
    plan = export(gguf_path, tmp_path / "back" / "model")
    folder = tmp_path / "back" / "model"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) == plan.size_bytes
    n_vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert_agreement(folder, gguf_path, random_prompts(n_vocab, (*SHORT, LONGER_THAN_THE_WINDOW)), 256, n_vocab)
    assert_same_tokens(folder, gguf_path)
    assert_same_gguf(gguf_path, convert(folder, tmp_path / "two.gguf", "f32"))


@pytest.mark.parametrize("kind", ["llama3", "qwen3_moe", "gemma3_json", "gemma3_vision", "gpt2"])
def test_a_16_bit_gguf_becomes_the_checkpoint_that_it_was_made_from(kind: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path / "model")
    gguf_path = convert(tmp_path / "model", tmp_path / "one.gguf")
    (tmp_path / "back").mkdir()
    plan = export(gguf_path, tmp_path / "back" / "model")
    before = {
        name.replace("language_model.", ""): tensor
        for name, tensor in tensors_of(tmp_path / "model").items()
        if "vision" not in name and "projector" not in name
    }
    assert tensors_of(tmp_path / "back" / "model") == before
    assert plan.dtype == "BF16" and plan.dtypes == {"BF16": len(before)}
    assert_same_gguf(gguf_path, convert(tmp_path / "back" / "model", tmp_path / "two.gguf"))


def test_float16_stays_float16(tmp_path: Path) -> None:
    build_model("qwen2", tmp_path / "model", dtype="float16")
    plan = export(convert(tmp_path / "model", tmp_path / "one.gguf"), tmp_path / "back")
    assert plan.dtype == "F16"
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "model")


def test_float32_vectors_keep_their_bits_beside_16_bit_matrices(tmp_path: Path) -> None:
    build_model("llama2", tmp_path / "model", dtype="float32")
    gguf_path = convert(tmp_path / "model", tmp_path / "one.gguf", "bf16")
    plan = export(gguf_path, tmp_path / "model-again")
    assert plan.dtypes["F32"] == 5 and plan.dtype == "BF16"
    assert_same_gguf(gguf_path, convert(tmp_path / "model-again", tmp_path / "two.gguf"))


def test_quantized_blocks_become_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build_model("llama2", tmp_path / "model", hidden_size=256)
    gguf_path = convert(tmp_path / "model", tmp_path / "q.gguf", quantize=QuantizeOptions(FileType.MOSTLY_Q4_K_M))
    exact = export(gguf_path, tmp_path / "exact", dtype="f32")
    rounded = export(gguf_path, tmp_path / "rounded")
    assert (exact.dtype, rounded.dtype) == ("F32", "BF16")
    assert json.loads((tmp_path / "rounded/config.json").read_text())["torch_dtype"] == "bfloat16"
    n_vocab = json.loads((tmp_path / "exact/config.json").read_text())["vocab_size"]
    assert_close_to_engine(tmp_path / "exact", gguf_path, random_prompts(n_vocab, SHORT), n_vocab)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    assert str(model.dtype) == "torch.bfloat16"


def assert_close_to_engine(folder: Path, gguf_path: Path, prompts: list[list[int]], n_vocab: int) -> None:
    """llama.cpp rounds activations to 8 bits where weights are quantized, so it is near and not nearer."""
    one = Sampling(max_tokens=1, temperature=0.0, seed=0)
    with open_engine(gguf_path, context_length=64, n_threads=1) as engine:
        first = [engine.generate(prompt, one, n_logprobs=n_vocab) for prompt in prompts]
    for generation, rows in zip(first, reference_logprobs(folder, prompts), strict=True):
        for said in generation.logprobs:
            differences = [abs(logprob - float(rows[-1][token_id])) for token_id, logprob in said.top.items()]
            assert float(np.median(differences)) < 0.05


def test_a_large_model_is_shared_out_among_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build_model("qwen3_moe", tmp_path / "model")
    gguf_path = convert(tmp_path / "model", tmp_path / "one.gguf")
    plan = export(gguf_path, tmp_path / "back", max_shard_bytes=100_000)
    assert len(plan.shards.shards) > 3 and (tmp_path / "back/model.safetensors.index.json").is_file()
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.num_experts == 4


def test_the_same_file_gives_the_same_bytes_and_names_no_path(tmp_path: Path) -> None:
    build_model("phi3_long", tmp_path / "model")
    gguf_path = convert(tmp_path / "model", tmp_path / "secret-place.gguf")
    for name in ("one", "two"):
        export(gguf_path, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    for file in files:
        if (tmp_path / "one" / file).is_file():
            content = (tmp_path / "one" / file).read_bytes()
            assert content == (tmp_path / "two" / file).read_bytes()
            assert b"secret-place" not in content and str(tmp_path).encode() not in content


def test_lineage_sampling_and_licence_survive_the_folder(tmp_path: Path) -> None:
    build_model("qwen2", tmp_path / "model")
    (tmp_path / "model/README.md").write_text(
        "---\nlicense: other\nlicense_name: my-licence\nlicense_link: https://example.org/l\n"
        "base_model: Qwen/Qwen2.5-0.5B\ndatasets:\n- one/data-set\n- name: Two\n  url: https://example.org/d\n"
        "tags:\n- chat\nlanguage:\n- en\n- no\nauthor: Somebody\nversion: '1.0'\n---\n# A model\n"
    )
    generation = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": [1, 2]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(generation))
    gguf_path = convert(tmp_path / "model", tmp_path / "one.gguf")
    (tmp_path / "back").mkdir()
    export(gguf_path, tmp_path / "back" / "model")
    assert_same_gguf(gguf_path, convert(tmp_path / "back" / "model", tmp_path / "two.gguf"))
    card = (tmp_path / "back/model/README.md").read_text()
    assert "base_model:\n- Qwen/Qwen2.5-0.5B\n" in card and "license_name: my-licence" in card
    settings = json.loads((tmp_path / "back/model/generation_config.json").read_text())
    assert (settings["temperature"], settings["top_k"], settings["do_sample"]) == (0.7, 20, True)


def test_numbers_are_written_as_people_write_them(tmp_path: Path) -> None:
    build_model("llama3", tmp_path / "model")
    export(convert(tmp_path / "model", tmp_path / "one.gguf"), tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05 and config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config["tie_word_embeddings"] is True


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    build_model("llama2", folder / "model")
    return convert(folder / "model", folder / "one.gguf", "f32")


def changed_gguf(
    source: Path,
    out: Path,
    *,
    drop: str = "",
    add: tuple[TensorEntry, ...] = (),
    fields: tuple[Field, ...] = (),
    without: str = "",
) -> Path:
    """A copy of a GGUF with tensors and fields taken away, put in or replaced."""
    with open_gguf(source) as gguf:
        replaced = {field.key for field in fields} | {without}
        kept = [from_reader(entry) for key, entry in gguf.fields.items() if key not in replaced]
        entries = [copy_entry(gguf, name) for name in gguf.tensors if name != drop]
        with atomic_output(out) as sink:
            write_gguf(sink, [*kept, *fields], [*entries, *add])
    return out


def zeros(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, shape, GGMLType.F32, lambda: [bytes(4 * int(np.prod(shape)))])


def value_of(first: float) -> TensorEntry:
    content = np.full(64 * 700, first, "<f4").tobytes()
    return TensorEntry("output.weight", (700, 64), GGMLType.F32, lambda: [content])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor is missing": ({"drop": "blk.1.attn_q.weight"}, "'blk.1.attn_q.weight' is missing"),
    "a tensor of nobody": ({"add": (zeros("blk.0.attn_sinks.weight", 4),)}, "no tensor 'blk.0.attn_sinks.weight'"),
    "a layer too many": ({"add": (zeros("blk.7.attn_norm.weight", 64),)}, "layer 7 of 2"),
    "a matrix of another width": (
        {"drop": "blk.0.ffn_up.weight", "add": (zeros("blk.0.ffn_up.weight", 96, 32),)},
        "64 wide",
    ),
    "more rows than tokens": ({"drop": "token_embd.weight", "add": (zeros("token_embd.weight", 701, 64),)}, "701 rows"),
    "some biases": ({"add": (zeros("blk.0.attn_q.bias", 64),)}, "no bias, and others"),
    "no tokens": ({"without": "tokenizer.ggml.tokens"}, "no vocabulary|0 tokens"),
    "another tokenizer": ({"fields": (string("tokenizer.ggml.model", "bert"),)}, "'bert'"),
    "no layers": ({"without": "llama.block_count"}, "block_count"),
    "another family": ({"fields": (string("general.architecture", "mamba"),)}, "'mamba'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_hold_together_is_refused_at_planning(case: str, small_gguf: Path, tmp_path: Path) -> None:
    changes, words = BROKEN[case]
    path = changed_gguf(small_gguf, tmp_path / "broken.gguf", **changes)
    with pytest.raises(ForgeError, match=words) as caught, open_checkpoint(path) as checkpoint:
        plan_hf_folder(checkpoint)
    assert caught.value.next or caught.value.why


def test_a_number_too_large_for_float16_is_refused_by_name(small_gguf: Path, tmp_path: Path) -> None:
    path = changed_gguf(small_gguf, tmp_path / "large.gguf", drop="output.weight", add=(value_of(70000.0),))
    with pytest.raises(GGUFError, match=r"'output.weight' holds a weight beyond 65504 \(70000\)"):
        export(path, tmp_path / "out", dtype="f16")
    export(path, tmp_path / "wide", dtype="bf16")


def test_pictures_are_left_out_and_said_so(small_gguf: Path, tmp_path: Path) -> None:
    path = changed_gguf(small_gguf, tmp_path / "seeing.gguf", add=(zeros("v.patch_embd.weight", 4, 4),))
    plan = export(path, tmp_path / "out")
    assert plan.skipped == ("v.patch_embd.weight",) and "pictures" in plan.warnings[0]


def test_biases_of_attention_are_announced_in_the_configuration(small_gguf: Path, tmp_path: Path) -> None:
    sizes = {"q": 64, "k": 32, "v": 32, "output": 64}
    biases = [zeros(f"blk.{layer}.attn_{part}.bias", size) for layer in (0, 1) for part, size in sizes.items()]
    path = changed_gguf(small_gguf, tmp_path / "biased.gguf", add=tuple(biases))
    export(path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["attention_bias"] is True
    assert_same_gguf_tensors(path, convert(tmp_path / "out", tmp_path / "two.gguf", "f32"))


def assert_same_gguf_tensors(first: Path, second: Path) -> None:
    with open_gguf(first) as one, open_gguf(second) as two:
        assert {name: bytes(one.read(name)) for name in one.tensors} == {
            name: bytes(two.read(name)) for name in two.tensors
        }


@pytest.mark.parametrize("dtype", ["q8_0", "float32", ""])
def test_other_dtypes_are_refused(dtype: str, small_gguf: Path) -> None:
    with pytest.raises(UsageError, match="Known: auto, f32, f16, bf16"), open_checkpoint(small_gguf) as checkpoint:
        plan_hf_folder(checkpoint, HFOptions(dtype=dtype))
