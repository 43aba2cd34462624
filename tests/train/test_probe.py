"""What other types would do to a model, against really having them in the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import packed_sources as sources
import pytest

from ollama_forge.dataset.windows import Window, make_window
from ollama_forge.errors import FormatError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry
from ollama_forge.gguf.mixture import QuantizeOptions
from ollama_forge.gguf.quantize import plan_quantization
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, GGMLType
from ollama_forge.gguf.weight_error import weight_error
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.train import probe as probe_module
from ollama_forge.train.probe import Probe
from ollama_forge.train.scored_model import ScoreOptions, scored_model
from ollama_forge.train.scoring import compare

EXACT = ScoreOptions(is_exact=True)
FAMILIES = ("llama", "qwen3_moe", "gemma3", "gpt2", "phi3")


def windows(seed: int = 0, count: int = 2, length: int = 24) -> tuple[Window, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        make_window([int(token) for token in rng.integers(0, sources.VOCABULARY, length)], length // 2)
        for _ in range(count)
    )


def write_model(name: str, path: Path, type: GGMLType = GGMLType.F32) -> Path:
    sources.write_gguf_of(sources.dense_model(name), name, path, type)
    return path


def quantized(source: Path, target: Path, types: Mapping[str, GGMLType], imatrix: Imatrix | None = None) -> Path:
    patterns = tuple((f"^{name}$", type) for name, type in types.items())
    options = QuantizeOptions(FileType.ALL_F32, imatrix=imatrix, tensor_types=patterns, n_threads=1)
    with open_gguf(source) as file, atomic_output(target) as sink:
        plan = plan_quantization(file, options)
        write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)
    return target


def written_divergence(source: Path, target: Path) -> float:
    with scored_model(target, options=EXACT) as this, scored_model(source, options=EXACT) as against:
        return compare(this, against, windows(), n_worst=0).kl.mean


def probed(source: Path, mixes: list[dict[str, GGMLType]], imatrix: Imatrix | None = None) -> list[float]:
    with (
        open_gguf(source) as file,
        scored_model(file, options=EXACT) as packed,
        scored_model(file, options=EXACT) as reference,
    ):
        probe = Probe(packed, reference, windows(), imatrix)
        return [probe.divergence(types) for types in mixes]


def every_matrix(source: Path, types: list[GGMLType]) -> dict[str, GGMLType]:
    with open_gguf(source) as file:
        names = [
            name
            for name, tensor in file.tensors.items()
            if len(tensor.shape) > 1 and "gate_inp" not in name and "position" not in name
        ]
    return {name: types[number % len(types)] for number, name in enumerate(names)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_probed_mix_costs_what_the_written_file_costs(tmp_path: Path, name: str) -> None:
    source = write_model(name, tmp_path / "source.gguf")
    types = every_matrix(source, [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.Q3_K])
    written = written_divergence(source, quantized(source, tmp_path / "small.gguf", types))
    assert written > 1e-6
    assert probed(source, [types]) == [pytest.approx(written, rel=1e-4)]


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2"))
def test_blocks_that_are_not_run_again_change_no_number(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(name, tmp_path / "source.gguf")
    mixes = [{tensor: GGMLType.Q2_K} for tensor in every_matrix(source, [GGMLType.Q2_K])]
    skipping = probed(source, mixes)
    monkeypatch.setattr(probe_module, "KEPT_BYTES", 0)
    assert skipping == probed(source, mixes)
    assert all(cost > 0 for cost in skipping)


def test_the_model_is_as_before_after_each_question(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source.gguf")
    types = every_matrix(source, [GGMLType.Q2_K])
    one = {"blk.1.ffn_down.weight": GGMLType.Q4_K}
    first, _, again, nothing = probed(source, [one, types, one, {}])
    assert first == again
    assert nothing == 0


def test_types_that_tensors_have_already_cost_nothing(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source.gguf", GGMLType.Q8_0)
    assert probed(source, [every_matrix(source, [GGMLType.Q8_0])]) == [0.0]


def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source.gguf")
    order = [GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_K, GGMLType.Q2_K]
    costs = probed(source, [every_matrix(source, [type]) for type in order])
    assert costs == sorted(costs)
    with open_gguf(source) as file:
        errors = [weight_error(file, "blk.0.ffn_up.weight", type) for type in order]
        assert weight_error(file, "blk.0.ffn_up.weight", GGMLType.F32) == 0
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", ("llama", "qwen3_moe"))
def test_an_importance_matrix_is_used_as_the_quantizer_uses_it(tmp_path: Path, name: str) -> None:
    source = write_model(name, tmp_path / "source.gguf")
    types = every_matrix(source, [GGMLType.Q3_K])
    rng = np.random.default_rng(1)
    entries = {}
    with open_gguf(source) as file:
        for tensor in types:
            shape = file.tensors[tensor].shape
            n_matrices = shape[0] if len(shape) > 2 else 1
            sums = rng.uniform(0.01, 9, (n_matrices, shape[-1])).astype(np.float32)
            entries[tensor] = ImatrixEntry(sums, np.ones(n_matrices, np.int64))
    imatrix = Imatrix(entries)
    written = written_divergence(source, quantized(source, tmp_path / "small.gguf", types, imatrix))
    with_it, without = probed(source, [types], imatrix)[0], probed(source, [types])[0]
    assert with_it == pytest.approx(written, rel=1e-4)
    assert with_it != pytest.approx(without, rel=1e-3)
    with open_gguf(source) as file:
        plain = weight_error(file, "blk.0.attn_v.weight", GGMLType.Q3_K)
        assert weight_error(file, "blk.0.attn_v.weight", GGMLType.Q3_K, imatrix) != plain


def test_an_importance_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source.gguf")
    imatrix = Imatrix({"blk.0.attn_v.weight": ImatrixEntry(np.ones((1, 8), np.float32), np.ones(1, np.int64))})
    with pytest.raises(FormatError, match=r"blk\.0\.attn_v"):
        probed(source, [{"blk.0.attn_v.weight": GGMLType.Q4_K}], imatrix)


def test_more_windows_than_run_at_once_are_refused(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "source.gguf")
    with (
        open_gguf(source) as file,
        scored_model(file, options=EXACT) as packed,
        pytest.raises(UsageError, match="too many"),
    ):
        Probe(packed, packed, windows(count=100))
