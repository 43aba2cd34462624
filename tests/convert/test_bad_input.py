"""Folders that are incomplete, broken or wrong: each a clear error that names the file and the next step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import build_model, change_config, read_json, split_in_two

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import (
    ForgeError,
    FormatError,
    GGUFError,
    NotFoundError,
    SafetensorsError,
    UnsafeFileError,
    UnsupportedError,
    UsageError,
)
from ollama_forge.files import atomic_output
from ollama_forge.gguf.writer import write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("whole")

    def build(kind: str) -> Path:
        if not (home / kind).exists():
            build_model(kind, home / kind)
        return home / kind

    return build


@pytest.fixture
def copy(whole: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def copied(kind: str = "llama2") -> Path:
        shutil.copytree(whole(kind), tmp_path / "model")
        return tmp_path / "model"

    return copied


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, kind: type[ForgeError], words: str) -> ForgeError:
    with pytest.raises(kind, match=words) as caught:
        plan_conversion(folder)
    assert caught.value.what and (caught.value.why or caught.value.next)
    return caught.value


def test_a_folder_without_config_json(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    assert "original repository" in refusal(folder, NotFoundError, r"config\.json").next


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refusal(tmp_path / "absent", NotFoundError, "absent")


def test_a_truncated_shard(copy: Callable[..., Path]) -> None:
    folder = copy()
    split_in_two(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "half downloaded" in refusal(folder, SafetensorsError, "model-00002-of-00002").why


def test_a_shard_that_leads_away(copy: Callable[..., Path]) -> None:
    folder = copy()
    split_in_two(folder)
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../x")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder, UnsafeFileError, r"\.\./x")


def test_only_a_pickle(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder, UnsafeFileError, r"pytorch_model\.bin").next


def test_a_missing_tensor(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refusal(folder, SafetensorsError, r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'")


def test_a_missing_expert(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3_moe")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    assert "Layer 1" in refusal(folder, SafetensorsError, "lacks").why


def test_a_tensor_that_nobody_knows(copy: Callable[..., Path]) -> None:
    folder = copy()

    def add(tensors: dict) -> None:  # type: ignore[type-arg]
        tensors["model.layers.0.mlp.surprise.weight"] = tensors["model.norm.weight"].clone()

    edit_tensors(folder, add)
    assert "--converter" in refusal(folder, UnsupportedError, "surprise").next


def test_more_layers_than_the_configuration_says(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"num_hidden_layers": 1})
    refusal(folder, SafetensorsError, "layer 1")


def test_fewer_layers_than_the_configuration_says(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"num_hidden_layers": 3})
    refusal(folder, SafetensorsError, r"layers\.2")


def test_heads_that_do_not_divide_the_rows(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"num_attention_heads": 5})
    refusal(folder, FormatError, "among 5 heads")


def test_a_model_of_another_width(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"hidden_size": 128})
    refusal(folder, SafetensorsError, "the model is 128 wide")


def test_a_vocabulary_of_another_size(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"vocab_size": read_json(folder / "config.json")["vocab_size"] + 3})
    refusal(folder, SafetensorsError, "The embedding has")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0},
        {"rms_norm_eps": "small"},
        {"max_position_embeddings": 2**40},
        {"rope_parameters": 5},
        {"rope_parameters": {"rope_theta": "high"}},
        {"rope_parameters": {"rope_type": 7}},
        {"rope_scaling": {"rope_type": "llama3", "factor": float("inf")}},
        {"vocab_size": -4},
    ],
)
def test_a_configuration_with_nonsense(changes: dict[str, object], copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, changes)
    refusal(folder, FormatError, r"config\.json|says that it has -4 tokens")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\0", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_configuration_that_is_none(text: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    refusal(folder, FormatError, "config")


def test_a_configuration_that_does_not_say_what_it_is(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {}, remove=("architectures", "model_type"))
    refusal(folder, FormatError, "names neither")


def test_a_configuration_without_architectures_is_known_by_its_model_type(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {}, remove=("architectures",))
    with plan_conversion(folder) as conversion:
        assert conversion.family.name == "llama"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_weights_packed_in_another_way(method: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, {"quantization_config": {"quant_method": method, "format": "pack-quantized"}})
    assert "BF16" in refusal(folder, UnsupportedError, method).next


def test_whole_numbers_are_not_weights(copy: Callable[..., Path]) -> None:
    import torch

    folder = copy()

    def pack(tensors: dict) -> None:  # type: ignore[type-arg]
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    edit_tensors(folder, pack)
    refusal(folder, UnsupportedError, "I8")


def test_a_weight_too_large_for_f16(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()

    def grow(tensors: dict) -> None:  # type: ignore[type-arg]
        tensors["lm_head.weight"][3, 4] = 1e6

    edit_tensors(folder, grow)
    refused = pytest.raises(GGUFError, match=r"output\.weight.*65504")
    with (
        plan_conversion(folder, ConvertOptions(outtype="f16")) as plan,
        refused,
        atomic_output(tmp_path / "out") as sink,
    ):
        write_gguf(sink, plan.fields, plan.entries)
    assert not (tmp_path / "out").exists()


def test_an_unknown_outtype(copy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="q4_k_m") as caught:
        plan_conversion(copy(), ConvertOptions(outtype="q4_k_m"))
    assert "--quant" in caught.value.next


def test_what_gguf_cannot_say_is_told(copy: Callable[..., Path]) -> None:
    folder = copy("qwen2")
    change_config(folder, {"use_sliding_window": True, "hidden_act": "relu"})
    with plan_conversion(folder) as conversion:
        assert any("use_sliding_window" in warning for warning in conversion.warnings)
        assert any("'relu'" in warning for warning in conversion.warnings)


def test_a_broken_model_card_is_a_warning(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "README.md").write_text("---\ntags: [unclosed\n---\n")
    with plan_conversion(folder) as conversion:
        assert any("README.md" in warning for warning in conversion.warnings)
