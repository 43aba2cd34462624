"""Adapters of every form are found, read and checked; what is ill is refused with the name of the ill part."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_adapters import build_ggla

from ollama_forge.errors import AdapterError, ForgeError, NotFoundError, UnsafeFileError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, float32, string, write_gguf
from ollama_forge.weights.adapter import AdapterKind, find_adapter, open_adapter
from ollama_forge.weights.adapter_parts import ReplacementKind

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/Model-1B"}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def write_peft(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    pair = {f"{QUERY}.lora_A.weight": floats(2, 8), f"{QUERY}.lora_B.weight": floats(8, 2)}
    save_file(pair if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def write_lora(path: Path, tensors: dict[str, np.ndarray], alpha: float | None = 4.0, **kinds: str) -> Path:
    words = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", **kinds}
    fields = [string(key.replace("__", "."), value) for key, value in words.items()]
    fields += [] if alpha is None else [float32("adapter.lora.alpha", alpha)]
    with atomic_output(path, overwrite=True) as sink:
        entries = [
            TensorEntry(name, values.shape, GGMLType.F32, lambda values=values: [values.tobytes()])  # type: ignore[misc]
            for name, values in tensors.items()
        ]
        write_gguf(sink, fields, entries)
    return path


def refused(path: Path, *words: str) -> ForgeError:
    with pytest.raises(ForgeError) as caught, open_adapter(path) as adapter:
        for pair in adapter.pairs:
            pair.a.read()
            pair.b.read()
        for item in adapter.replacements:
            item.tensor.read()
    text = str(caught.value)
    assert all(word in text for word in words), text
    return caught.value


def test_a_peft_folder_gives_pairs_with_their_scale(tmp_path: Path) -> None:
    with open_adapter(write_peft(tmp_path / "a")) as adapter:
        (pair,) = adapter.pairs
        assert (adapter.kind, adapter.base_names) == (AdapterKind.PEFT, ("org/Model-1B",))
        assert (pair.target, pair.rank, pair.scale, pair.strength) == (
            "model.layers.0.self_attn.q_proj.weight",
            2,
            2,
            4,
        )
        np.testing.assert_array_equal(pair.a.read(), floats(2, 8))
        np.testing.assert_array_equal(pair.b.read(), floats(8, 2))


def test_ranks_and_alphas_follow_the_patterns(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.down_proj"
    tensors = {
        f"{QUERY}.lora_A.weight": floats(3, 8),
        f"{QUERY}.lora_B.weight": floats(8, 3),
        f"{key}.lora_A.weight": floats(2, 8),
        f"{key}.lora_B.weight": floats(8, 2),
    }
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"model\.layers\.1\.mlp\.down_proj": 10, "proj": 99}}
    with open_adapter(write_peft(tmp_path / "a", tensors, use_rslora=True, **patterns)) as adapter:
        scales = {pair.target.split(".")[-2]: pair.scale for pair in adapter.pairs}
    assert scales == {"q_proj": pytest.approx(4 / 3**0.5), "down_proj": pytest.approx(10 / 2**0.5)}


def test_a_lora_gguf_gives_the_same_kind_of_pairs(tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    tensors = {
        f"{name}.lora_a": floats(2, 8),
        f"{name}.lora_b": floats(8, 2),
        "token_embd.weight.lora_a": floats(30, 2),
        "token_embd.weight.lora_b": floats(8, 2, seed=1),
        "blk.0.attn_norm.weight": floats(8),
    }
    with open_adapter(write_lora(tmp_path / "l.gguf", tensors)) as adapter:
        query, embedding = adapter.pairs
        assert (adapter.architecture, query.scale, query.shape) == ("llama", 2.0, (8, 8))
        assert embedding.shape == (30, 8)
        np.testing.assert_array_equal(embedding.a.read(), floats(8, 2, seed=1).T)
        assert [item.target for item in adapter.replacements] == ["blk.0.attn_norm.weight"]


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_lora_gguf_without_alpha_has_the_scale_1(alpha: float | None, tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": floats(2, 8), "blk.0.attn_q.weight.lora_b": floats(8, 2)}
    with open_adapter(write_lora(tmp_path / "l.gguf", tensors, alpha)) as adapter:
        assert adapter.pairs[0].scale == 1.0


def test_an_old_file_divides_alpha_by_the_rank_of_its_header(tmp_path: Path) -> None:
    pairs = {"blk.0.attn_q.weight": (floats(2, 8), floats(8, 2)), "blk.0.ffn_up.weight": (floats(1, 8), floats(8, 1))}
    build_ggla(tmp_path / "g.bin", pairs, rank=2, alpha=6)
    with open_adapter(tmp_path / "g.bin") as adapter:
        assert [pair.scale for pair in adapter.pairs] == [3.0, 3.0]
        assert [pair.strength for pair in adapter.pairs] == [6.0, 3.0]
        np.testing.assert_array_equal(adapter.pairs[0].a.read(), floats(2, 8))


def test_a_bin_file_of_peft_is_read_without_running_it(tmp_path: Path) -> None:
    import torch

    folder = write_peft(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    tensors = {f"{QUERY}.lora_A.weight": floats(2, 8), f"{QUERY}.lora_B.weight": floats(8, 2)}
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin", folder / "adapter_config.json"):
        with open_adapter(path) as adapter:
            np.testing.assert_array_equal(adapter.pairs[0].b.read(), floats(8, 2))


class Bomb:
    """Runs a command when it is unpickled the unsafe way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_bin_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    import torch

    folder = write_peft(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, folder / "adapter_model.bin")
    for _ in range(2):
        error = refused(folder, "adapter_model.bin", "safetensors")
        assert "weights_only" not in error.why and "only running its code" in error.why
        (folder / "adapter_model.bin").write_bytes(b"not a pickle at all")
    assert not (tmp_path / "ran").exists()


# The rules by which a path is understood.


def test_a_folder_with_exactly_one_adapter_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    build_ggla(
        tmp_path / "one" / "ggml-adapter-f32.bin",
        {"blk.0.attn_q.weight": (floats(2, 8), floats(8, 2))},
        rank=2,
        alpha=2,
    )
    (tmp_path / "one" / "notes.txt").write_text("x")
    assert find_adapter(tmp_path / "one").path.name == "ggml-adapter-f32.bin"
    assert find_adapter(tmp_path / "one").kind is AdapterKind.GGLA
    tensors = {"blk.0.attn_q.weight.lora_a": floats(2, 8), "blk.0.attn_q.weight.lora_b": floats(8, 2)}
    write_lora(tmp_path / "one" / "second.gguf", tensors)
    refused(tmp_path / "one", "holds 2 .gguf or .bin files", "second.gguf")


def test_what_is_no_adapter_does_not_count_in_a_folder(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": floats(2, 8), "blk.0.attn_q.weight.lora_b": floats(8, 2)}
    write_lora(tmp_path / "imatrix.gguf", {}, **{"general.type": "imatrix"})
    write_lora(tmp_path / "model.gguf", {}, **{"general.type": "model"})
    (tmp_path / "optimizer.bin").write_bytes(b"PK\x03\x04 a pickle")
    lora = write_lora(tmp_path / "lora.gguf", tensors)
    assert find_adapter(tmp_path).path == lora
    lora.unlink()
    refused(tmp_path, "holds 3 .gguf or .bin files")
    trained = write_peft(tmp_path / "adapter")
    assert find_adapter(tmp_path).path == trained and find_adapter(tmp_path).kind is AdapterKind.PEFT


def test_a_gguf_is_known_by_its_bytes_whatever_it_is_called(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": floats(2, 8), "blk.0.attn_q.weight.lora_b": floats(8, 2)}
    write_lora(tmp_path / "lora.bin", tensors)
    assert find_adapter(tmp_path / "lora.bin").kind is AdapterKind.GGUF


def test_what_is_no_adapter_is_told_what_an_adapter_is(tmp_path: Path) -> None:
    hint = "If this is a llama.cpp LoRA, pass the .bin or .gguf file path, or the directory containing it."
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no adapter", hint)
    assert isinstance(refused(tmp_path / "nothing", hint), NotFoundError)
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04 a pickle somewhere")
    refused(tmp_path / "x.bin", "is no adapter", hint)
    write_lora(tmp_path / "m.gguf", {}, **{"general.type": "model"})
    refused(tmp_path / "m.gguf", "not a LoRA adapter")


def test_half_a_peft_folder_names_the_missing_half(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a")
    config = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").unlink()
    refused(folder, "has no adapter_config.json")
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors", "weights of the adapter are missing")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a")
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert isinstance(refused(folder, "outside"), UnsafeFileError)


# Ill adapters.

A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: floats(2, 8)}, ("lora_A", "without its partner")),
        ({B: floats(8, 2)}, ("lora_B", "without its partner")),
        ({A: floats(2, 8), B: floats(8, 3)}, ("lora_B", "do not fit each other")),
        ({A: floats(0, 8), B: floats(8, 0)}, ("lora_A", "rank is 0")),
        ({A: floats(2, 8), B: floats(0, 2)}, ("lora_B", "empty")),
        ({A: floats(16), B: floats(8, 2)}, ("lora_A", "a matrix is expected")),
        ({A: floats(2, 8) * np.nan, B: floats(8, 2)}, ("lora_A", "not finite")),
        ({A: floats(2, 8), B: np.full((8, 2), np.inf, np.float32)}, ("lora_B", "not finite")),
        ({A: floats(4, 8), B: floats(8, 4)}, ("rank 4", "adapter_config.json says 2")),
        ({A: np.ones((2, 8), np.int32), B: floats(8, 2)}, ("lora_A", "I32")),
        ({A: floats(2, 8), B: floats(8, 2), f"{QUERY}.lora_C.weight": floats(2)}, ("lora_C", "means nothing known")),
        ({A: floats(2, 8), B: floats(8, 2), f"{QUERY}.hada_w1": floats(2)}, ("hada_w1", "means nothing known")),
        ({A: floats(2, 8), B: floats(8, 2), f"{QUERY}.lora_magnitude_vector": floats(3)}, ("magnitude_vector", "(3,)")),
        (
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": floats(2, 8)},
            ("trainable_tokens_delta", "single tokens"),
        ),
        ({"base_model.model.model.layers.0.mlp.experts.lora_A.weight": floats(8, 8)}, ("experts", "stacked experts")),
        ({}, ("no tensors",)),
    ],
)
def test_ill_tensors_are_refused_by_name(
    tensors: dict[str, np.ndarray], words: tuple[str, ...], tmp_path: Path
) -> None:
    assert isinstance(refused(write_peft(tmp_path / "a", tensors), *words), AdapterError)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 0}, ("rank r is 0",)),
        ({"r": "8"}, ("rank r is '8'",)),
        ({"lora_alpha": 0}, ("alpha", "0")),
        ({"lora_alpha": "x"}, ("lora_alpha", "x")),
        ({"lora_alpha": 1e300}, ("lora_alpha",)),
        ({"peft_type": "LOHA"}, ("LOHA", "not a LoRA")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights", "pissa")),
        ({"layer_replication": [[0, 2], [1, 3]]}, ("layer_replication",)),
        ({"use_qalora": True}, ("use_qalora",)),
        ({"use_dora": True}, ("no magnitude vector",)),
        ({"rank_pattern": ["q_proj"]}, ("rank_pattern",)),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern",)),
        ({"alpha_pattern": {"(": 1}}, ("pattern '('",)),
        ({"alpha_pattern": {"(a*)*b": 1}}, ("pattern '(a*)*b'", "busy for ever")),
        ({"alpha_pattern": {"x" * 400: 1}}, ("pattern",)),
        ({"alora_invocation_tokens": [-1]}, ("alora_invocation_tokens",)),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(
    config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    assert isinstance(refused(write_peft(tmp_path / "a", **config), *words), AdapterError)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"r": 1, "r": 2}', '{"lora_parameters": {"rank": 8}}'])
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json")


def test_what_peft_saves_beside_the_pairs_is_kept_apart(tmp_path: Path) -> None:
    head = "base_model.model.lm_head"
    tensors = {
        A: floats(2, 8),
        B: floats(8, 2),
        f"{QUERY}.base_layer.bias": floats(8),
        f"{head}.base_layer.weight": floats(30, 8),
        "base_model.model.model.norm.weight": floats(8),
        "base_model.model.model.embed_tokens.modules_to_save.default.weight": floats(30, 8),
    }
    with open_adapter(write_peft(tmp_path / "a", tensors)) as adapter:
        found = {item.target: item.kind for item in adapter.replacements}
    assert found == {
        "model.layers.0.self_attn.q_proj.bias": ReplacementKind.TRAINED,
        "lm_head.weight": ReplacementKind.BASE_COPY,
        "model.norm.weight": ReplacementKind.TRAINED,
        "model.embed_tokens.weight": ReplacementKind.TRAINED,
    }


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.0.attn_q.weight.lora_a": floats(2, 8)}, ("lora_a", "without its partner")),
        ({"blk.0.attn_q.weight": floats(8, 8)}, ("blk.0.attn_q.weight", "no part of a LoRA")),
        ({"x.weight.lora_a": floats(8), "x.weight.lora_b": floats(8, 2)}, ("x.weight.lora_a", "a matrix is expected")),
        ({"x.weight.lora_a": floats(2, 8), "x.weight.lora_b": floats(2, 8)}, ("do not fit each other",)),
        ({"token_embd.weight.lora_a": floats(8), "token_embd.weight.lora_b": floats(8)}, ("a matrix is expected",)),
    ],
)
def test_ill_lora_ggufs_are_refused_by_name(
    tensors: dict[str, np.ndarray], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(write_lora(tmp_path / "l.gguf", tensors), *words)


def ggla(tmp_path: Path) -> bytes:
    pairs = {"blk.0.attn_q.weight": (floats(2, 8), floats(8, 2)), "blk.0.ffn_up.weight": (floats(2, 8), floats(12, 2))}
    build_ggla(tmp_path / "good.bin", pairs, rank=2, alpha=6)
    return (tmp_path / "good.bin").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[:14],
        lambda c: c[:-1],
        lambda c: c[:30],
        lambda c: b"algg" + struct.pack("<I", 2) + c[8:],
        lambda c: c[:8] + struct.pack("<I", 0) + c[12:],
        lambda c: c[:16] + struct.pack("<I", 9) + c[20:],
        lambda c: c[:20] + struct.pack("<I", 1 << 31) + c[24:],
        lambda c: c[:24] + struct.pack("<I", 12) + c[28:],
        lambda c: c[:28] + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + c[36:],
        lambda c: c.replace(b"loraB", b"loraC", 1),
        lambda c: c.replace(b"loraB", b"loraA", 1),
        lambda c: c.replace(b"blk.0.attn_q.weight", b"BLK/0/attn_q/weight"),
        lambda c: c + c[16:],
    ],
)
def test_broken_old_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = damage(ggla(tmp_path))
    (tmp_path / "bad.bin").write_bytes(content)
    refused(tmp_path / "bad.bin")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_old_files_are_read_or_refused_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(ggla(tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(4, len(content)))]
    path = tmp_path / "mutant.bin"
    path.write_bytes(content)
    try:
        with open_adapter(path) as adapter:
            for pair in adapter.pairs:
                assert pair.a.read().shape[0] == pair.rank == pair.b.read().shape[1]
    except ForgeError as exc:
        assert exc.what
