"""Quantizing while converting gives the file that converting first and quantizing then gives."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import build_model, quantize_fp8

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry
from ollama_forge.gguf.quantize import QuantizeOptions, plan_quantization
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import parse_file_type, parse_type
from ollama_forge.gguf.writer import write_gguf


def convert(folder: Path, out: Path, options: ConvertOptions) -> None:
    with plan_conversion(folder, options) as conversion:
        with atomic_output(out) as sink:
            write_gguf(sink, conversion.fields, conversion.entries)
        assert out.stat().st_size == conversion.size_bytes


def quantize_in_two_passes(folder: Path, out: Path, options: QuantizeOptions) -> None:
    convert(folder, out.with_suffix(".base"), ConvertOptions())
    with open_gguf(out.with_suffix(".base")) as source, atomic_output(out) as sink:
        plan = plan_quantization(source, options)
        write_gguf(sink, plan.fields, plan.entries)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("one-pass")
    wanted = {
        "llama3": ("llama3", "bfloat16"),
        "mistral-f32": ("mistral", "float32"),
        "qwen3_moe": ("qwen3_moe", "bfloat16"),
        "gpt2-f16": ("gpt2", "float16"),
        "gemma2": ("gemma2", "bfloat16"),
        "fp8": ("qwen2", "bfloat16"),
    }
    for name, (kind, dtype) in wanted.items():
        build_model(kind, home / name, dtype=dtype, hidden_size=256)
    quantize_fp8(home / "fp8", (128, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "_scale_inv")
    return {name: home / name for name in wanted}


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "Q4_0", "IQ4_XS", "F16"])
@pytest.mark.parametrize("name", ["llama3", "mistral-f32", "qwen3_moe", "gpt2-f16", "gemma2", "fp8"])
def test_one_pass_equals_two_passes(name: str, quant: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = QuantizeOptions(parse_file_type(quant))
    convert(folders[name], tmp_path / "one.gguf", ConvertOptions(quantize=options))
    quantize_in_two_passes(folders[name], tmp_path / "two.gguf", options)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_one_pass_uses_the_importance_matrix_and_overrides(folders: dict[str, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with plan_conversion(folders["llama3"]) as conversion:
        columns = {entry.name: entry.shape[-1] for entry in conversion.entries if ".ffn_" in entry.name}
    entries = {
        name: ImatrixEntry(random.random((1, size), np.float32) + 0.01, np.ones(1, np.float32))
        for name, size in columns.items()
        if "norm" not in name
    }
    options = QuantizeOptions(
        parse_file_type("IQ4_XS"),
        imatrix=Imatrix(entries, ("text.txt",), chunk_count=1, chunk_size=512, file_name="importance.gguf"),
        tensor_types=((r"attn_v\.weight", parse_type("q8_0")),),
    )
    convert(folders["llama3"], tmp_path / "one.gguf", ConvertOptions(quantize=options))
    quantize_in_two_passes(folders["llama3"], tmp_path / "two.gguf", options)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    with open_gguf(tmp_path / "one.gguf") as file:
        assert file.tensors["blk.0.attn_v.weight"].type.name == "Q8_0"


def test_the_same_input_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ConvertOptions(quantize=QuantizeOptions(parse_file_type("Q4_K_M")))
    convert(folders["llama3"], tmp_path / "first.gguf", options)
    convert(folders["llama3"], tmp_path / "second.gguf", options)
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def test_quantizing_twice_is_refused(folders: dict[str, Path]) -> None:
    options = ConvertOptions(outtype="q8_0", quantize=QuantizeOptions(parse_file_type("Q4_0")))
    with pytest.raises(UsageError, match="do not go together"):
        plan_conversion(folders["llama3"], options)
