"""An adapter fits the base that it was trained on, and every tensor that finds no home in another is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_adapters import build_adapter, change_tensors, targets_of
from tiny_models import build_model, change_config

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import AdapterError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.weights.adapter import open_adapter
from ollama_forge.weights.adapter_base import describe_base
from ollama_forge.weights.adapter_fit import fit_adapter, try_fit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    for kind in ("llama2", "qwen2", "gemma3_vision"):
        build_model(kind, folder / kind)
        with plan_conversion(folder / kind, ConvertOptions()) as plan, atomic_output(folder / f"{kind}.gguf") as sink:
            write_gguf(sink, plan.fields, plan.entries)
    build_model("llama2", folder / "wide", hidden_size=128)
    build_model("gpt2", folder / "gpt2")
    build_adapter(folder / "llama2", folder / "a", target_modules=targets_of("llama2"))
    return folder


@pytest.mark.parametrize("base", ["llama2", "llama2.gguf"])
def test_every_pair_finds_its_home(base: str, home: Path) -> None:
    with open_adapter(home / "a") as adapter:
        fitted = fit_adapter(adapter, describe_base(home / base))
        assert len(fitted.pairs) == len(adapter.pairs) == 14
        shapes = {pair.gguf_name: pair.pair.shape for pair in fitted.pairs}
    described = describe_base(home / base)
    assert described.shapes is not None
    assert all(described.shapes[name] == shape for name, shape in shapes.items())


def test_folder_and_gguf_describe_one_base_alike(home: Path) -> None:
    one, two = describe_base(home / "llama2"), describe_base(home / "llama2.gguf")
    assert one.shapes == two.shapes and one.architecture == two.architecture
    assert (one.n_tokens, one.is_tied) == (two.n_tokens, two.is_tied)
    assert describe_base(home / "qwen2").is_tied and describe_base(home / "qwen2.gguf").is_tied


def test_the_configuration_alone_is_enough(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((home / "llama2" / "config.json").read_bytes())
    with open_adapter(home / "a") as adapter:
        described = describe_base(tmp_path)
        assert described.shapes is None
        assert len(fit_adapter(adapter, described).pairs) == 14
        change_config(tmp_path, {"num_hidden_layers": 1})
        with pytest.raises(AdapterError, match=r"layers\.1\."):
            fit_adapter(adapter, describe_base(tmp_path))


@pytest.mark.parametrize(
    ("base", "kind", "tensor"),
    [
        ("wide", "shape", "down_proj.lora_B"),
        ("qwen2.gguf", "", ""),
        ("gpt2", "target", "down_proj.lora_B"),
    ],
)
def test_another_base_is_refused_with_the_first_misfit(base: str, kind: str, tensor: str, home: Path) -> None:
    with open_adapter(home / "a") as adapter:
        described = describe_base(home / base)
        fitted, misfits = try_fit(adapter, described)
        if not kind:  # of the same shapes and names: only the name of the base tells them apart
            assert not misfits
            return
        assert len(misfits) == 14 and not fitted.pairs and {misfit.kind for misfit in misfits} == {kind}
        with pytest.raises(AdapterError, match=tensor) as caught:
            fit_adapter(adapter, described)
        assert "trained on" in caught.value.next


def test_tensors_without_a_home_are_never_dropped(home: Path, tmp_path: Path) -> None:
    build_adapter(home / "llama2", tmp_path / "a", target_modules=["q_proj"])
    module = "model.layers.0.self_attn.z_proj"
    zeros = np.zeros((4, 64), np.float32)
    change_tensors(tmp_path / "a", {f"{module}.lora_A.weight": zeros, f"{module}.lora_B.weight": zeros.T.copy()})
    with open_adapter(tmp_path / "a") as adapter, pytest.raises(AdapterError, match="z_proj") as caught:
        fit_adapter(adapter, describe_base(home / "llama2.gguf"))
    assert "z_proj" in caught.value.why


def test_new_tokens_are_counted(home: Path, tmp_path: Path) -> None:
    build_adapter(home / "llama2", tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    n_tokens = describe_base(home / "llama2").n_tokens
    assert n_tokens is not None
    change_tensors(tmp_path / "a", {"model.embed_tokens.weight": np.zeros((n_tokens + 3, 64), np.float32)})
    with open_adapter(tmp_path / "a") as adapter, pytest.raises(AdapterError, match="embed_tokens") as caught:
        fit_adapter(adapter, describe_base(home / "llama2.gguf"))
    assert "3 more tokens" in caught.value.why


def test_the_part_for_pictures_is_named_as_such(home: Path, tmp_path: Path) -> None:
    build_adapter_of_seeing(home / "gemma3_vision", tmp_path / "a")
    with open_adapter(tmp_path / "a") as adapter, pytest.raises(AdapterError, match="vision_tower") as caught:
        fit_adapter(adapter, describe_base(home / "gemma3_vision.gguf"))
    assert "pictures" in caught.value.why
    change_tensors(tmp_path / "a", {}, drop=tuple(_vision_names(tmp_path / "a")))
    with open_adapter(tmp_path / "a") as adapter:
        names = {pair.gguf_name for pair in fit_adapter(adapter, describe_base(home / "gemma3_vision.gguf")).pairs}
    assert names == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}


def build_adapter_of_seeing(base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)


def _vision_names(folder: Path) -> list[str]:
    from tiny_adapters import read_tensors

    return [name for name in read_tensors(folder) if "vision_tower" in name]
