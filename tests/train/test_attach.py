"""A packed model with an adapter attached answers as transformers' model in PEFT's wrapper does."""

from pathlib import Path

import pytest
from tiny_adapters import build_adapter, targets_of
from tiny_models import build_model

from ollama_forge.dataset.windows import make_window
from ollama_forge.errors import AdapterError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.train.scored_model import ScoreOptions, scored_model
from ollama_forge.train.scoring import compare
from ollama_forge.transform.lora import WeightedAdapter
from ollama_forge.weights.adapter import open_adapter
from ollama_forge.weights.adapter_base import describe_gguf
from ollama_forge.weights.adapter_fit import fit_adapter

EXACT = ScoreOptions(is_exact=True, device="cpu")
WINDOWS = [make_window(list(range(5 + shift, 29 + shift))) for shift in range(3)]


def converted(kind: str, folder: Path) -> Path:
    build_model(kind, folder / "base", dtype="float32")
    convert_folder(folder / "base", folder / "base.gguf", ConvertOptions(outtype="f32"))
    return folder / "base.gguf"


@pytest.mark.parametrize("kind", ["llama2", "qwen2", "gemma2", "phi3", "gpt2", "qwen3_moe"])
def test_an_attached_adapter_does_what_peft_does(kind: str, tmp_path: Path) -> None:
    path = converted(kind, tmp_path)
    wrapped = build_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets_of(kind))
    with open_gguf(path) as gguf, open_adapter(tmp_path / "adapter") as adapter:
        fitted = WeightedAdapter(fit_adapter(adapter, describe_gguf(gguf)))
        with scored_model(gguf, [fitted], EXACT) as packed:
            result = compare(packed, wrapped, WINDOWS)
            assert result.kl.max < 1e-6
        with scored_model(gguf, (), EXACT) as plain:
            assert compare(plain, wrapped, WINDOWS).kl.mean > 1e-3


def test_strengths_add_up_and_hooks_are_taken_off(tmp_path: Path) -> None:
    path = converted("llama2", tmp_path)
    build_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets_of("llama2"))
    with open_gguf(path) as gguf, open_adapter(tmp_path / "adapter") as adapter:
        fitted = fit_adapter(adapter, describe_gguf(gguf))
        halves = [WeightedAdapter(fitted, 0.25), WeightedAdapter(fitted, 0.75)]
        with scored_model(gguf, halves, EXACT) as twice, scored_model(gguf, [WeightedAdapter(fitted)], EXACT) as once:
            assert compare(twice, once, WINDOWS).kl.max < 1e-6
        assert not any(module._forward_hooks for module in twice.model.modules())


def test_what_only_a_merge_can_express_is_refused_by_name(tmp_path: Path) -> None:
    path = converted("llama2", tmp_path)
    build_adapter(tmp_path / "base", tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    with open_gguf(path) as gguf, open_adapter(tmp_path / "dora") as adapter:
        fitted = WeightedAdapter(fit_adapter(adapter, describe_gguf(gguf)))
        with pytest.raises(AdapterError, match="q_proj"), scored_model(gguf, [fitted], EXACT):
            pass
