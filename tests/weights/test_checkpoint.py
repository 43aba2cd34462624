"""A model is the same model, whether it lies in a Hugging Face folder or in a GGUF file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import KINDS, build_model, quantize_fp8, stack_experts

from ollama_forge.arch.rows import Residual, Role, Transform
from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import NotFoundError, UnsupportedError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.types import GGMLType, parse_file_type
from ollama_forge.gguf.writer import string, write_gguf
from ollama_forge.weights.checkpoint import Checkpoint, Layout, TensorKey, open_checkpoint

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A folder and its GGUF in float32, by kind."""
    home = tmp_path_factory.mktemp("checkpoints")

    def build(kind: str) -> Pair:
        folder, out = home / kind, home / f"{kind}.gguf"
        if not out.exists():
            build_model(kind, folder, dtype="float32")
            with plan_conversion(folder, ConvertOptions(outtype="f32")) as conversion, atomic_output(out) as sink:
                write_gguf(sink, conversion.fields, conversion.entries)
        return folder, out

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_hold_the_same_numbers(kind: str, pair: Callable[[str], Pair]) -> None:
    folder, out = pair(kind)
    with open_checkpoint(folder) as source, open_checkpoint(out) as converted:
        assert not source.is_gguf and converted.is_gguf
        computed = {key for key in converted.tensors if key.role.value.startswith("rope_")}
        assert set(source.tensors) == set(converted.tensors) - computed
        for key, tensor in source.tensors.items():
            other = converted.tensors[key]
            assert tensor.hf_name == other.hf_name and tensor.gguf_name == other.gguf_name
            as_gguf = source.read_float32(tensor, Layout.GGUF)
            np.testing.assert_array_equal(as_gguf, converted.read_float32(other))
            as_hf = converted.read_float32(other, Layout.HF)
            exact = tensor.row.transform is not Transform.ADD_ONE
            np.testing.assert_allclose(as_hf, source.read_float32(tensor), rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gguf_alone_rebuilds_the_model_in_transformers(kind: str, pair: Callable[[str], Pair]) -> None:
    import torch
    import transformers

    folder, out = pair(kind)
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open_checkpoint(out) as checkpoint:
        config = transformers.AutoConfig.for_model(**checkpoint.hf_config)
        rebuilt: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        state = rebuilt.state_dict()
        stacks: dict[str, Any] = {}
        for tensor in checkpoint.tensors.values():
            if tensor.key.role.value.startswith("rope_"):
                continue
            values = torch.from_numpy(checkpoint.read_float32(tensor, Layout.HF).copy())
            if tensor.key.expert is None:
                assert state.pop(tensor.hf_name).shape == values.shape
                rebuilt.get_parameter(tensor.hf_name).data.copy_(values)
            else:
                stacks[tensor.hf_name] = values
        _load_experts(rebuilt, state, stacks)
        assert {name for name in state if name != "lm_head.weight"} == set()
    tokens = torch.arange(20, 100).reshape(1, -1)
    if kind == "gemma3_vision":
        original = original.model.language_model
        rebuilt = rebuilt.model
    with torch.no_grad():
        expected, found = original(tokens), rebuilt(tokens)
    torch.testing.assert_close(found[0], expected[0], atol=2e-4, rtol=1e-4)


def _load_experts(model: Any, state: dict[str, Any], experts: dict[str, Any]) -> None:
    """transformers 5 keeps the experts of a layer in two stacked parameters."""
    import torch

    for name in [name for name in state if ".mlp.experts." in name]:
        stacked = state.pop(name)
        prefix = name.rsplit(".", 1)[0]
        for expert in range(stacked.shape[0]):
            if name.endswith("down_proj"):
                value = experts[f"{prefix}.{expert}.down_proj.weight"]
            else:
                gate, up = (experts[f"{prefix}.{expert}.{part}_proj.weight"] for part in ("gate", "up"))
                value = torch.cat([gate, up])
            model.get_parameter(name).data[expert].copy_(value)


def test_every_layer_writes_the_residual_stream_along_the_axis_that_the_row_names(pair: Callable[[str], Pair]) -> None:
    for kind in KINDS:
        with open_checkpoint(pair(kind)[1]) as checkpoint:
            hidden = checkpoint.config.hidden_size
            for tensor in checkpoint.tensors.values():
                if tensor.row.residual is not Residual.NONE:
                    assert tensor.spec.shape[tensor.row.residual_axis] == hidden
            for layer in range(checkpoint.config.n_layers):
                writers = {
                    key.role
                    for key, tensor in checkpoint.tensors.items()
                    if key.layer == layer and tensor.row.residual is Residual.WRITES and not key.is_bias
                }
                assert len(writers) == 2 and Role.ATTENTION_OUTPUT in writers


def test_stacked_and_separate_experts_are_the_same_model(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder, out = pair("qwen3_moe")
    shutil.copytree(folder, tmp_path / "stacked")
    stack_experts(tmp_path / "stacked")
    with open_checkpoint(tmp_path / "stacked") as stacked, open_checkpoint(folder) as separate:
        assert set(stacked.tensors) == set(separate.tensors)
        for key, tensor in separate.tensors.items():
            np.testing.assert_array_equal(stacked.read_float32(stacked.tensors[key]), separate.read_float32(tensor))
    options = ConvertOptions(outtype="f32")
    with plan_conversion(tmp_path / "stacked", options) as plan, atomic_output(tmp_path / "stacked.gguf") as sink:
        write_gguf(sink, plan.fields, plan.entries)
    with open_checkpoint(tmp_path / "stacked.gguf") as ours, open_checkpoint(out) as theirs:
        assert set(ours.tensors) == set(theirs.tensors)
        for key, tensor in ours.tensors.items():
            assert ours.read_raw(tensor) == theirs.read_raw(theirs.tensors[key])


def test_quantized_tensors_keep_their_own_encoding(tmp_path: Path) -> None:
    build_model("llama3", tmp_path / "model", hidden_size=256)
    options = ConvertOptions(quantize=QuantizeOptions(parse_file_type("Q4_K_M")))
    with plan_conversion(tmp_path / "model", options) as conversion, atomic_output(tmp_path / "q.gguf") as sink:
        write_gguf(sink, conversion.fields, conversion.entries)
    with open_checkpoint(tmp_path / "q.gguf") as checkpoint, open_checkpoint(tmp_path / "model") as source:
        query = checkpoint.find(Role.ATTENTION_QUERY, 0)
        assert query.spec.encoding is GGMLType.Q4_K and query.row.is_permuted
        original = source.read_float32(source.find(Role.ATTENTION_QUERY, 0))
        assert np.abs(checkpoint.read_float32(query, Layout.HF) - original).max() < 0.1 * np.abs(original).max()


def test_fp8_is_read_with_its_scales(tmp_path: Path) -> None:
    build_model("qwen2", tmp_path / "plain")
    build_model("qwen2", tmp_path / "fp8")
    quantize_fp8(tmp_path / "fp8", None, {"quant_method": "fp8"}, "_scale_inv")
    with open_checkpoint(tmp_path / "plain") as plain, open_checkpoint(tmp_path / "fp8") as packed:
        assert set(plain.tensors) == set(packed.tensors)
        value = packed.find(Role.FFN_UP, 1)
        assert value.spec.encoding == "F8_E4M3"
        original = plain.read_float32(plain.find(Role.FFN_UP, 1))
        assert np.abs(packed.read_float32(value) - original).max() < 0.07 * np.abs(original).max()


def test_the_template_is_found_in_both_forms(pair: Callable[[str], Pair]) -> None:
    folder, out = pair("qwen2")
    with open_checkpoint(folder) as source, open_checkpoint(out) as converted:
        assert source.chat_template and source.chat_template == converted.chat_template


def test_what_is_not_there_is_said_with_its_place(pair: Callable[[str], Pair]) -> None:
    with open_checkpoint(pair("llama3")[1]) as checkpoint:
        assert TensorKey(Role.OUTPUT) not in checkpoint.tensors
        with pytest.raises(NotFoundError, match="no router in layer 1"):
            checkpoint.find(Role.ROUTER, 1)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "x.gguf") as sink:
        write_gguf(sink, [string("general.architecture", "mamba2")], [])
    with pytest.raises(UnsupportedError, match="mamba2") as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert "qwen3moe" in caught.value.why


def read_all(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.read_float32(tensor).size for tensor in checkpoint.tensors.values())


def test_reading_after_release_still_works(pair: Callable[[str], Pair]) -> None:
    for path in pair("phi3"):
        with open_checkpoint(path) as checkpoint:
            before = read_all(checkpoint)
            for tensor in checkpoint.tensors.values():
                checkpoint.release(tensor)
            assert read_all(checkpoint) == before
