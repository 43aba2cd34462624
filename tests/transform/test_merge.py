"""Merging equals PEFT's own dense merge, in every form of base; what is not edited stays byte for byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_adapters import build_adapter, build_ggla, targets_of, wrap
from tiny_models import build_model

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.errors import AdapterError, ForgeError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from ollama_forge.gguf.mixture import QuantizeOptions
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, is_quantized
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.jobs.adapters import convert_adapter
from ollama_forge.jobs.merging import MergeInput, MergeOptions, merge_model
from ollama_forge.jobs.resolve import ResolvedModel

KINDS = ("llama2", "llama3", "qwen2", "gemma3", "phi3", "gpt2", "qwen3_moe")


def to_gguf(folder: Path, out: Path, outtype: str = "f32", file_type: FileType | None = None) -> None:
    quantize = QuantizeOptions(file_type) if file_type is not None else None
    options = ConvertOptions(outtype=outtype, quantize=quantize)
    with plan_conversion(folder, options) as conversion, atomic_output(out) as sink:
        write_gguf(sink, conversion.fields, conversion.entries)


def gguf(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), gguf_path=path)


def folder(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), folder=path)


def inputs(*paths: Path, weights: Sequence[float] = ()) -> list[MergeInput]:
    return [MergeInput(path, weight) for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)]


def floats_of(path: Path) -> dict[str, np.ndarray]:
    with open_gguf(path) as file:
        return {name: dequantize(file.read(name), t.type, t.shape) for name, t in file.tensors.items()}


def bytes_of(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as file:
        return {name: bytes(file.read(name)) for name in file.tensors}


def fields_of(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as file:
        return {key: bytes(entry.raw) for key, entry in file.fields.items()}


def dense_merge(wrapped: Any, tmp_path: Path, base: Path) -> dict[str, np.ndarray]:
    """PEFT's own merge, converted to float32 GGUF."""
    merged = tmp_path / "dense"
    wrapped.merge_and_unload().save_pretrained(merged)
    for path in base.iterdir():
        if "token" in path.name and not (merged / path.name).exists():
            (merged / path.name).write_bytes(path.read_bytes())
    to_gguf(merged, tmp_path / "dense.gguf")
    return floats_of(tmp_path / "dense.gguf")


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, Path, Any]]:
    """(base folder, adapter folder, PEFT model) of a kind."""

    def make(kind: str, *, dtype: str = "float32", hidden_size: int = 64, **settings: Any) -> tuple[Path, Path, Any]:
        base = tmp_path / "base"
        if not base.exists():
            build_model(kind, base, dtype=dtype, hidden_size=hidden_size)
        wanted = {"target_modules": targets_of(kind), "fan_in_fan_out": kind == "gpt2", **settings}
        return base, tmp_path / "a", build_adapter(base, tmp_path / "a", **wanted)

    return make


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_merge_equals_pefts(kind: str, made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, wrapped = made(kind)
    to_gguf(base, tmp_path / "base.gguf")
    merged = merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert_close(floats_of(tmp_path / "m.gguf"), dense_merge(wrapped, tmp_path, base))
    assert all(loss.survived == pytest.approx(1, abs=1e-4) for loss in merged.losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_merged_into_a_folder_that_transformers_loads(
    kind: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    base, adapter, wrapped = made(kind)
    merged = merge_model(folder(base), inputs(adapter), tmp_path / "m")
    to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert_close(floats_of(tmp_path / "m.gguf"), dense_merge(wrapped, tmp_path, base))
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "m"))
    edited = {loss.name for loss in merged.losses}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == edited
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    assert merged.edited == len(edited) and merged.edited + merged.untouched == len(before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_merge_is_the_nearest_number(dtype: str, made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", dtype=dtype)
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    to_gguf(base, tmp_path / "base.gguf", short)
    merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    exact = dense_merge(wrap(base, target_modules=targets_of("llama2")), tmp_path, base)
    with open_gguf(tmp_path / "m.gguf") as file:
        for name, tensor in file.tensors.items():
            nearest = quantize(np.ascontiguousarray(exact[name].reshape(-1, exact[name].shape[-1])), tensor.type)
            found = np.frombuffer(file.read(name), np.uint8)
            step = dequantize(nearest, tensor.type, tensor.shape) - dequantize(found, tensor.type, tensor.shape)
            # A float32 sum in another order may fall on the other side of a rounding edge, seldom.
            assert np.count_nonzero(step) <= max(1, step.size // 500), name


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q6_K", "Q4_0", "IQ4_XS", "Q3_K_M"])
def test_a_quantized_base_stays_in_its_types_and_loses_one_rounding(
    file_type: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapter, _ = made("llama2", hidden_size=256)
    source = tmp_path / "base.gguf"
    to_gguf(base, source, "f32", getattr(FileType, f"MOSTLY_{file_type}"))
    to_gguf(base, tmp_path / "f32.gguf")
    merged = merge_model(gguf(source), inputs(adapter), tmp_path / "m.gguf")
    merge_model(gguf(tmp_path / "f32.gguf"), inputs(adapter), tmp_path / "exact.gguf")
    before, dense, exact = (floats_of(tmp_path / name) for name in ("base.gguf", "f32.gguf", "exact.gguf"))
    with open_gguf(source) as old, open_gguf(tmp_path / "m.gguf") as new:
        assert list(old.tensors) == list(new.tensors)
        edited = {loss.name for loss in merged.losses}
        assert any(is_quantized(new.tensors[name].type) for name in edited)
        for name, tensor in new.tensors.items():
            assert (tensor.type, tensor.shape) == (old.tensors[name].type, old.tensors[name].shape)
            if name not in edited:
                assert bytes(old.read(name)) == bytes(new.read(name)), name
                continue
            delta = exact[name] - dense[name]
            wanted = np.ascontiguousarray(before[name] + delta)
            once = dequantize(quantize(wanted, tensor.type), tensor.type, tensor.shape)
            found = dequantize(new.read(name), tensor.type, tensor.shape)
            assert np.linalg.norm(found - wanted) <= 1.2 * np.linalg.norm(once - wanted) + 1e-5
    for loss in merged.losses:
        assert loss.change > 0.05 and 0.8 < loss.survived < 1.2 and loss.relative_error < 0.25
    assert fields_of(source) == fields_of(tmp_path / "m.gguf")


def test_the_losses_are_those_of_the_stored_numbers(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", hidden_size=256, target_modules=["down_proj"])
    for name, file_type in (("base", FileType.MOSTLY_Q4_0), ("f32", None)):
        to_gguf(base, tmp_path / f"{name}.gguf", "f32", file_type)
    merged = merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    merge_model(gguf(tmp_path / "f32.gguf"), inputs(adapter), tmp_path / "exact.gguf")
    before, after, dense, exact = (floats_of(tmp_path / f"{n}.gguf") for n in ("base", "m", "f32", "exact"))
    for loss in merged.losses:
        delta = (exact[loss.name] - dense[loss.name]).astype(np.float64)
        wanted = before[loss.name] + delta
        assert loss.type == "Q4_0"
        assert loss.change == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before[loss.name]), rel=1e-3)
        error = np.linalg.norm(after[loss.name] - wanted) / np.linalg.norm(wanted)
        assert loss.relative_error == pytest.approx(error, rel=1e-3)
        kept = ((after[loss.name] - before[loss.name]) * delta).sum() / (delta**2).sum()
        assert loss.survived == pytest.approx(kept, rel=1e-3)


def test_a_change_too_small_for_the_quantization_is_told(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", hidden_size=256, spread=0.001)
    to_gguf(base, tmp_path / "base.gguf", "f32", FileType.MOSTLY_Q4_0)
    merged = merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert any("less than half of the change survived" in warning for warning in merged.warnings)


def test_several_adapters_add_up_with_their_weights(made: Callable[..., Any], tmp_path: Path) -> None:
    base, one, _ = made("llama2")
    build_adapter(base, tmp_path / "b", target_modules=["q_proj", "up_proj"], r=3, lora_alpha=9, seed=5)
    to_gguf(base, tmp_path / "base.gguf")
    single = {}
    for name, adapter in (("one", one), ("two", tmp_path / "b")):
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / f"{name}.gguf")
        single[name] = floats_of(tmp_path / f"{name}.gguf")
    both = inputs(one, tmp_path / "b", weights=(0.5, -2.0))
    merge_model(gguf(tmp_path / "base.gguf"), both, tmp_path / "both.gguf")
    plain, found = floats_of(tmp_path / "base.gguf"), floats_of(tmp_path / "both.gguf")
    for name, values in plain.items():
        wanted = values + 0.5 * (single["one"][name] - values) - 2 * (single["two"][name] - values)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "alpha_pattern": {"v_proj": 1.0}, "rank_pattern": {"k_proj": 7}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["dora", "rslora", "modules_to_save", "ends"],
)
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_what_a_layer_cannot_say_is_merged_exactly(
    form: str, settings: dict[str, Any], made: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapter, wrapped = made("llama2", **settings)
    if form == "gguf":
        to_gguf(base, tmp_path / "base.gguf")
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    else:
        merge_model(folder(base), inputs(adapter), tmp_path / "m")
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert_close(floats_of(tmp_path / "m.gguf"), dense_merge(wrapped, tmp_path, base))


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"lora_bias": True}], ids=["bias", "lora_bias"])
def test_trained_biases_are_merged(settings: dict[str, Any], made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, wrapped = made("qwen2", target_modules=["q_proj", "v_proj"], **settings)
    to_gguf(base, tmp_path / "base.gguf")
    merged = merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert "blk.0.attn_q.bias" in {loss.name for loss in merged.losses}
    assert_close(floats_of(tmp_path / "m.gguf"), dense_merge(wrapped, tmp_path, base))


def test_a_trained_norm_of_gemma_keeps_its_one(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, wrapped = made("gemma3", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    to_gguf(base, tmp_path / "base.gguf")
    merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert_close(floats_of(tmp_path / "m.gguf"), dense_merge(wrapped, tmp_path, base))


def test_a_tied_base_is_refused_unless_it_may_be_untied(made: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    base, adapter, wrapped = made("qwen2", target_modules=["q_proj", "embed_tokens"])
    to_gguf(base, tmp_path / "base.gguf")
    with pytest.raises(AdapterError, match="tied") as caught:
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert "--untie" in caught.value.next and not (tmp_path / "m.gguf").exists()
    with pytest.raises(AdapterError, match="cannot be part of an adapter file"):
        convert_adapter(adapter, tmp_path / "a.gguf", folder(base))
    with pytest.raises(AdapterError, match="tied"):
        merge_model(folder(base), inputs(adapter), tmp_path / "m")
    options = MergeOptions(untie=True)
    merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf", options)
    assert bytes_of(tmp_path / "m.gguf")["output.weight"] == bytes_of(tmp_path / "base.gguf")["token_embd.weight"]
    with open_engine(tmp_path / "m.gguf", context_length=64, n_threads=1) as engine:
        prompt = [30, 40, 50, 60]
        answer = engine.generate(prompt, Sampling(max_tokens=1, temperature=0.0, seed=0), n_logprobs=20)
    with torch.no_grad():
        wanted = torch.log_softmax(wrapped(torch.tensor([prompt])).logits[0, -1].double(), dim=-1)
    for said in answer.logprobs:
        assert max(abs(value - float(wanted[token])) for token, value in said.top.items()) < 1e-2


def test_a_family_without_a_head_of_its_own_cannot_be_untied(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("gemma2", target_modules=["q_proj", "embed_tokens"])
    to_gguf(base, tmp_path / "base.gguf")
    with pytest.raises(AdapterError, match="tied") as caught:
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf", MergeOptions(untie=True))
    assert "--untie" not in caught.value.next


def test_lora_gguf_and_peft_folder_merge_alike(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", use_rslora=True)
    to_gguf(base, tmp_path / "base.gguf")
    convert_adapter(adapter, tmp_path / "a.gguf", folder(base))
    for name, path in (("one", adapter), ("two", tmp_path / "a.gguf")):
        merge_model(gguf(tmp_path / "base.gguf"), inputs(path), tmp_path / f"{name}.gguf")
    assert_close(floats_of(tmp_path / "one.gguf"), floats_of(tmp_path / "two.gguf"))


def test_an_old_adapter_of_norms_and_embeddings_is_merged(tmp_path: Path) -> None:
    build_model("llama2", tmp_path / "base", dtype="float32")
    to_gguf(tmp_path / "base", tmp_path / "base.gguf")
    before = floats_of(tmp_path / "base.gguf")
    random = np.random.default_rng(0)
    n_tokens = before["token_embd.weight"].shape[0]
    pairs = {
        "blk.0.attn_norm.weight": (1, 64),
        "token_embd.weight": (n_tokens, 64),
        "blk.1.ffn_down.weight": (64, 96),
    }
    made = {
        name: (random.standard_normal((2, n_in), np.float32), random.standard_normal((n_out, 2), np.float32))
        for name, (n_out, n_in) in pairs.items()
    }
    build_ggla(tmp_path / "g.bin", made, rank=2, alpha=5)
    merge_model(gguf(tmp_path / "base.gguf"), inputs(tmp_path / "g.bin"), tmp_path / "m.gguf")
    after = floats_of(tmp_path / "m.gguf")
    for name, values in before.items():
        if name in made:
            a, b = made[name]
            values = values + 2.5 * (b @ a).reshape(values.shape)
        np.testing.assert_allclose(after[name], values, rtol=0, atol=1e-5)


def test_a_lora_gguf_merges_into_a_family_that_is_not_known(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2")
    to_gguf(base, tmp_path / "base.gguf")
    convert_adapter(adapter, tmp_path / "a.gguf", folder(base))
    merge_model(gguf(tmp_path / "base.gguf"), inputs(tmp_path / "a.gguf"), tmp_path / "known.gguf")
    for name in ("base", "a"):
        content = (tmp_path / f"{name}.gguf").read_bytes()
        # The same length, so that nothing else moves.
        (tmp_path / f"{name}2.gguf").write_bytes(content.replace(b"llama", b"zebra"))
    merge_model(gguf(tmp_path / "base2.gguf"), inputs(tmp_path / "a2.gguf"), tmp_path / "unknown.gguf")
    assert bytes_of(tmp_path / "known.gguf") == bytes_of(tmp_path / "unknown.gguf")
    with pytest.raises(AdapterError, match="finds no home"):
        merge_model(gguf(tmp_path / "base2.gguf"), inputs(adapter), tmp_path / "no.gguf")


def test_an_importance_matrix_is_used_for_what_is_encoded_anew(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", hidden_size=256, target_modules=["q_proj"])
    to_gguf(base, tmp_path / "base.gguf", "f32", FileType.MOSTLY_Q4_0)
    weights = np.geomspace(1, 1e4, 256, dtype=np.float32)
    entry = ImatrixEntry(weights.reshape(1, -1), np.array([1]))
    entries = {f"blk.{layer}.attn_q.weight": entry for layer in range(2)}
    write_imatrix(tmp_path / "i.gguf", Imatrix(entries))
    plain, found = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), plain)
    merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), found, MergeOptions(imatrix=tmp_path / "i.gguf"))
    one, two = bytes_of(plain), bytes_of(found)
    assert {name for name in one if one[name] != two[name]} == set(entries)


def test_types_that_need_an_importance_matrix_say_so_before_anything_is_written(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapter, _ = made("llama2", hidden_size=256, target_modules=["q_proj"])
    to_gguf(base, tmp_path / "f32.gguf")
    with open_gguf(tmp_path / "f32.gguf") as file:
        from ollama_forge.gguf.quantize import plan_quantization
        from ollama_forge.gguf.types import GGMLType

        entries = {
            f"blk.{layer}.attn_q.weight": ImatrixEntry(np.ones((1, 256), np.float32), np.array([1]))
            for layer in range(2)
        }
        options = QuantizeOptions(
            FileType.MOSTLY_Q8_0, imatrix=Imatrix(entries), tensor_types=(("attn_q", GGMLType.IQ2_XXS),)
        )
        plan = plan_quantization(file, options)
        with atomic_output(tmp_path / "base.gguf") as sink:
            write_gguf(sink, plan.fields, plan.entries)
    with pytest.raises(ForgeError, match="importance matrix"):
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_merging_is_deterministic_and_a_dry_run_knows_the_size(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", hidden_size=256)
    to_gguf(base, tmp_path / "base.gguf", "f32", FileType.MOSTLY_Q4_K_M)
    planned = merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "0.gguf", dry_run=True)
    assert not (tmp_path / "0.gguf").exists() and planned.is_dry_run and not planned.losses
    done = [
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / f"{n}.gguf", MergeOptions(n_threads=n))
        for n in (1, 2)
    ]
    assert done[0].sha256 == done[1].sha256
    assert planned.size_bytes == done[0].size_bytes == (tmp_path / "1.gguf").stat().st_size
    assert (planned.edited, planned.untouched) == (done[0].edited, done[0].untouched)


def test_order_would_matter_so_it_is_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", use_dora=True)
    build_adapter(base, tmp_path / "b", target_modules=["q_proj"])
    to_gguf(base, tmp_path / "base.gguf")
    source = gguf(tmp_path / "base.gguf")
    with pytest.raises(AdapterError, match="replaces or rescales"):
        merge_model(source, inputs(adapter, tmp_path / "b"), tmp_path / "m.gguf")
    with pytest.raises(AdapterError, match=r"magnitude.* cannot be merged with the weight 0\.5"):
        merge_model(source, inputs(adapter, weights=[0.5]), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_base_is_never_its_own_target(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("llama2", target_modules=["q_proj"])
    to_gguf(base, tmp_path / "base.gguf")
    with pytest.raises(ForgeError, match="base itself"):
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "base.gguf", overwrite=True)
    with pytest.raises(ForgeError, match="base itself"):
        merge_model(folder(base), inputs(adapter), base, overwrite=True)
    with pytest.raises(UsageError):
        merge_model(folder(base), inputs(adapter), tmp_path / "x.gguf")
    with pytest.raises(UsageError):
        merge_model(gguf(tmp_path / "base.gguf"), inputs(adapter), tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ForgeError, match="something else"):
        merge_model(folder(base), inputs(adapter), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "diary.txt").exists()


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A base of 200 MB and an adapter are merged in a process that may grow by much less."""
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, float32, string, write_gguf
home = Path(sys.argv[1])
rows = lambda n: (np.full((1024, 1024), 0.25, np.float32).tobytes() for _ in range(n))
names = [f"blk.{i}.ffn_up.weight" for i in range(12)]
with atomic_output(home / "base.gguf") as sink:
    write_gguf(sink, [string("general.architecture", "zebra")],
               [TensorEntry(name, (4096, 1024), GGMLType.F32, lambda: rows(4)) for name in names])
def part(shape):
    return lambda: [np.full(shape, 0.5, np.float32).tobytes()]
entries = []
for name in names:
    entries.append(TensorEntry(name + ".lora_a", (8, 1024), GGMLType.F32, part((8, 1024))))
    entries.append(TensorEntry(name + ".lora_b", (4096, 8), GGMLType.F32, part((4096, 8))))
with atomic_output(home / "a.gguf") as sink:
    fields = [string("general.architecture", "zebra"), string("general.type", "adapter"),
              string("adapter.type", "lora"), float32("adapter.lora.alpha", 8.0)]
    write_gguf(sink, fields, entries)
from ollama_forge.jobs.merging import MergeInput, merge_model
from ollama_forge.jobs.resolve import ResolvedModel
base = ResolvedModel("b", gguf_path=home / "base.gguf")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merged = merge_model(base, [MergeInput(home / "a.gguf")], home / "m.gguf")
assert merged.edited == 12 and abs(merged.losses[0].survived - 1) < 1e-4
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 100
