"""The tables of families agree with themselves, with gguf-py's names and with transformers' configurations."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import KINDS, build_model, read_json, spell_as_transformers_4

from ollama_forge.arch import layout
from ollama_forge.arch.config import ModelConfig, config_from_gguf, hyper_fields, parse_config
from ollama_forge.arch.families import (
    GGUF_ARCHITECTURES,
    HF_ARCHITECTURES,
    MODEL_TYPES,
    family_names,
    find_family,
    find_family_by_gguf,
    load_family,
)
from ollama_forge.arch.rope import RopeParameters, llama3_factors
from ollama_forge.arch.rows import Family, TensorAddress, Transform
from ollama_forge.errors import FormatError, UnsupportedError

FAMILIES = [load_family(name) for name in family_names()]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tables_and_rows_name_each_other(family: Family) -> None:
    assert {name for name, module in HF_ARCHITECTURES.items() if load_family(module) is family} == set(
        family.hf_architectures
    )
    assert find_family({"model_type": family.name}) is family
    same_tensors = find_family_by_gguf(family.gguf_architecture)
    assert {row.gguf_name for row in same_tensors.tensors} == {row.gguf_name for row in family.tensors}
    assert set(MODEL_TYPES.values()) == set(family_names()) >= set(GGUF_ARCHITECTURES.values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_lead_there_and_back(family: Family) -> None:
    for row in family.tensors:
        address = TensorAddress(row, 7 if row.is_per_layer else None, 11 if row.is_per_expert else None)
        if row.hf_name:
            assert family.rows_by_hf_name(address.hf_name) == (address,)
            assert family.rows_by_hf_name("language_model." + address.hf_name) == ()
            assert family.clean_hf_name("language_model." + address.hf_name) == address.hf_name
        found = family.address_by_gguf_name(address.gguf_name)
        assert found is not None and found.row is row and found.layer == address.layer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_gguf_names_are_those_of_gguf_py(family: Family) -> None:
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    known = {gguf.TENSOR_NAMES[tensor].format(bid="{layer}") for tensor in gguf.MODEL_TENSORS[number]}
    for row in family.tensors:
        assert row.gguf_name.rpartition(".")[0] in known
    names = gguf.get_tensor_name_map(number, 8)
    for row in family.tensors:
        if row.hf_name and not row.is_per_expert:
            address = TensorAddress(row, 5)
            assert names.get_name(address.hf_name, (".weight", ".bias")) == address.gguf_name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.1e3.mlp.up_proj.weight",
        "model.layers.².mlp.up_proj.weight",
        "model.layers.99999999999.mlp.up_proj.weight",
        "model.layers.#.mlp.up_proj.weight",
        "model.layers..mlp",
        "blk.#.attn_q.weight",
        "#",
        "",
    ],
)
def test_a_strange_name_is_no_tensor(name: str) -> None:
    assert load_family("llama").rows_by_hf_name(name) == ()
    assert load_family("llama").address_by_gguf_name(name) is None


def test_a_model_saved_without_its_head_is_understood() -> None:
    (address,) = load_family("qwen2").rows_by_hf_name("layers.3.self_attn.q_proj.bias")
    assert address.gguf_name == "blk.3.attn_q.bias"
    (address,) = load_family("gpt2").rows_by_hf_name("h.3.attn.c_attn.weight")
    assert address.gguf_name == "blk.3.attn_qkv.weight"


def test_an_unknown_class_is_refused_with_the_known_families() -> None:
    with pytest.raises(UnsupportedError, match="MambaForCausalLM") as caught:
        find_family({"architectures": ["MambaForCausalLM"], "model_type": "llama"})
    assert "gemma3" in caught.value.why and "--converter llama.cpp" in caught.value.next
    with pytest.raises(FormatError):
        find_family({})


def small(heads: int = 6, kv_heads: int = 2) -> ModelConfig:
    values = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 96, "num_hidden_layers": 1}
    return ModelConfig(values, RopeParameters())


@pytest.mark.parametrize("transform", Transform)
def test_every_transform_has_its_inverse(transform: Transform) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (96, 20)).astype(np.float32)
    there = layout.to_gguf(values, transform, small())
    np.testing.assert_array_equal(layout.to_hf(there, transform, small()), values)
    assert there.shape == layout.hf_shape(values.shape, transform)
    if transform is not Transform.NONE:
        assert there.shape != values.shape or (there != values).any()


@pytest.mark.parametrize("transform", [Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY, Transform.NONE])
def test_rows_can_be_moved_one_by_one(transform: Transform) -> None:
    values = np.arange(96, dtype=np.float32).reshape(96, 1)
    moved = layout.to_gguf(values, transform, small())
    assert layout.source_rows(96, transform, small()) == moved.reshape(-1).astype(int).tolist()


def test_rows_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(FormatError, match="among 6 heads"):
        layout.to_gguf(np.zeros((90, 4), np.float32), Transform.PERMUTE_QUERY, small())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_those_that_torch_computes(head_dim: int, factor: float) -> None:
    import math

    import torch

    frequencies = 1.0 / (500000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    expected = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        mixed = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else float(mixed))
    rope = RopeParameters("llama3", 500000.0, None, factor, 8192, None, 1.0, 4.0)
    found = llama3_factors(rope, head_dim)
    assert [struct.pack("<f", value) for value in found] == [struct.pack("<f", value) for value in expected]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        build_model(kind, home / kind)
    return {kind: home / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings_of_a_configuration_give_the_same_fields(kind: str, folders: dict[str, Path]) -> None:
    new = read_json(folders[kind] / "config.json")
    copied = folders[kind].parent / f"{kind}-4"
    copied.mkdir()
    (copied / "config.json").write_text(json.dumps(new))
    spell_as_transformers_4(copied)
    old = read_json(copied / "config.json")
    assert kind == "gpt2" or old != new
    family = find_family(new)
    assert hyper_fields(family, parse_config(family, old)) == hyper_fields(family, parse_config(family, new))


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_metadata_make_the_configuration_again(kind: str, folders: dict[str, Path]) -> None:
    import transformers

    raw = read_json(folders[kind] / "config.json")
    family = find_family(raw)
    config = parse_config(family, raw)
    metadata: dict[str, Any] = {entry.key: entry.value for entry in hyper_fields(family, config)}
    metadata["tokenizer.ggml.tokens"] = ["x"] * config.values["vocab_size"]
    computed = family.computed(config) if family.computed else ()
    names = [] if config.values.get("tie_word_embeddings") else ["output.weight"]
    factors = {tensor.row.gguf_name: tensor.values for tensor in computed}
    made = config_from_gguf(family, metadata, tensor_names=names, rope_factors=factors)
    found = transformers.AutoConfig.for_model(**made).to_dict()
    original = transformers.AutoConfig.from_pretrained(folders[kind]).to_dict()
    original = {**original, **original.get("text_config", {})}
    ignored = {"architectures", "dtype", "initializer_range", "use_cache", "transformers_version", "_name_or_path"}
    ignored |= {"bos_token_id", "eos_token_id", "pad_token_id", "vision_config", "text_config", "max_window_layers"}
    for key, value in found.items():
        if key in original and key not in ignored and not key.startswith(("summary", "task")):
            assert value == pytest.approx(original[key]) if isinstance(value, float) else value == original[key], key


def test_the_rows_are_read_without_numpy() -> None:
    code = "import sys, ollama_forge.arch.families as f; [f.load_family(n) for n in f.family_names()]"
    code += "; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
