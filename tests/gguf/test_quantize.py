"""Quantized files against `llama-quantize`'s own, kept as goldens; and what a broken or unfit source says."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import quantize_sources as sources
from shards import write_shards

from ollama_forge.errors import FormatError, GGUFError, UnsupportedError, UsageError
from ollama_forge.files import atomic_output, hash_file
from ollama_forge.gguf import quantize as quantize_module
from ollama_forge.gguf.imatrix import Imatrix, read_imatrix
from ollama_forge.gguf.mix_rules import MAIN_TYPES
from ollama_forge.gguf.quantize import Quantization, QuantizeOptions, plan_quantization, quantized_entry
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, GGMLType, tensor_bytes
from ollama_forge.gguf.writer import write_gguf

GOLDENS = Path(__file__).parent.parent / "goldens" / "quantize"
LOWEST = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"}
OPTION_SETS = {
    "pure": {"pure": True},
    "leave-output": {"leave_output_tensor": True},
    "ends": {"output_tensor_type": GGMLType.Q5_K, "token_embedding_type": GGMLType.Q8_0},
    "overrides": {
        "tensor_types": ((r"blk\.[0-3]\.attn_v", GGMLType.Q5_0), ("ffn_(up|down)", GGMLType.IQ4_XS)),
    },
}

OVERRIDES_IGNORED = ("F16", "overrides")
"""llama-quantize drops --tensor-type in 16-bit files without a word; here it works (test_mixture)."""

ROWS_DO_NOT_DIVIDE = ("refused: no tensor type fallback", "refused: quantized data validation failed")
"""Where llama-quantize gives up on a row's length, or breaks on a type the user named, there is a fallback here."""


def golden_lines(name: str, lowest: bool) -> list[tuple[str, str, str]]:
    """(file type, label, text) of each line of a golden that holds the lowest types, or the others."""
    lines = (GOLDENS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    parts = [tuple(line.split(" ", 2)) for line in lines if not line.startswith(("#", "key "))]
    return [part for part in parts if (part[0] in LOWEST) is lowest]


def quantize_file(source: Path, target: Path, options: QuantizeOptions) -> Quantization:
    with open_gguf(source) as opened:
        plan = plan_quantization(opened, options)
        with atomic_output(target, overwrite=True) as sink:
            write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)
    assert target.stat().st_size == plan.size_bytes
    return plan


def check_golden(name: str, folder: Path, *, lowest: bool) -> None:
    lively = sources.write_source(folder / "source.gguf", name)
    calm = sources.write_source(folder / "calm.gguf", name, calm=True)
    imatrix = read_imatrix(sources.write_source_imatrix(folder / sources.IMATRIX_NAME, name))
    wrong = []
    for word, label, golden in golden_lines(name, lowest):
        source = calm if word in sources.CALM_FILE_TYPES else lively
        given = imatrix if label == "imatrix" else None
        options = QuantizeOptions(sources.file_type(word), given, n_threads=2, **OPTION_SETS.get(label, {}))
        if golden.startswith("refused: this quantization requires an imatrix"):
            with open_gguf(source) as opened, pytest.raises(UsageError, match="needs an importance matrix"):
                plan_quantization(opened, options)
        elif golden.startswith(ROWS_DO_NOT_DIVIDE):
            with open_gguf(source) as opened:
                assert plan_quantization(opened, options).fallbacks
        elif (word, label) != OVERRIDES_IGNORED:
            quantize_file(source, folder / "out.gguf", options)
            ours = sources.describe(folder / "out.gguf", MAIN_TYPES[options.file_type])
            if ours != golden:
                wrong.append(f"{word} {label}\n  ours   {ours}\n  golden {golden}")
    assert not wrong, "\n".join(wrong)


def quantize_plainly(source: Path, target: Path, word: str = "Q4_K_M", **options: Any) -> Quantization:
    return quantize_file(source, target, QuantizeOptions(sources.file_type(word), **options))


@pytest.mark.parametrize("name", sources.SOURCES)
def test_types_bytes_and_keys_equal_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    check_golden(name, tmp_path, lowest=False)


def test_the_lowest_types_equal_those_of_llama_quantize(tmp_path: Path) -> None:
    """In one test, because ggml builds large tables for these types once in a process."""
    for name in sources.SOURCES:
        check_golden(name, tmp_path, lowest=True)


def test_the_keys_are_those_of_llama_quantize_one_by_one(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "gemma3")
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / sources.IMATRIX_NAME, "gemma3"))
    quantize_plainly(source, tmp_path / "out.gguf", imatrix=imatrix)
    lines = (GOLDENS / "gemma3.txt").read_text(encoding="utf-8").splitlines()
    golden = [line.removeprefix("key ") for line in lines if line.startswith("key ")]
    assert sources.describe_fields(gguf.GGUFReader(tmp_path / "out.gguf")) == golden


def test_every_source_has_a_golden_for_each_of_its_file_types() -> None:
    for name, source in sources.SOURCES.items():
        lines = golden_lines(name, lowest=False) + golden_lines(name, lowest=True)
        assert {(word, label) for word, label, _ in lines} >= {
            (word, label) for word in source.file_types for label in ("plain", "imatrix")
        }


def test_the_bytes_do_not_depend_on_the_number_of_threads_or_the_size_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "qwen3moe")
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / "i.gguf", "qwen3moe"))
    seen = set()
    for piece_elements, n_threads in ((1 << 18, 1), (1 << 18, 3), (1, 3), (600, 2), (2000, 5)):
        monkeypatch.setattr(quantize_module, "PIECE_ELEMENTS", piece_elements)
        quantize_plainly(source, tmp_path / "out.gguf", imatrix=imatrix, n_threads=n_threads)
        seen.add(hash_file(tmp_path / "out.gguf").sha256)
    assert len(seen) == 1


def test_rows_are_given_in_pieces_however_large_the_tensor_is() -> None:
    n_rows, n_columns = 4096, 256
    asked: list[int] = []

    def read_rows(first: int, count: int) -> np.ndarray:
        asked.append(count)
        return np.full((count, n_columns), first % 7, np.float32)

    entry = quantized_entry("a.weight", (n_rows, n_columns), GGMLType.F32, read_rows, GGMLType.Q8_0, n_threads=2)
    pieces = [memoryview(piece).nbytes for piece in entry.chunks()]
    assert sum(pieces) == tensor_bytes(GGMLType.Q8_0, (n_rows, n_columns)) == entry.nbytes
    assert max(asked) * n_columns <= quantize_module.PIECE_ELEMENTS
    assert sum(asked) == n_rows


def test_untouched_tensors_and_other_keys_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "gpt2")
    plan = quantize_plainly(source, tmp_path / "out.gguf", "Q5_K_S")
    with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
        assert list(after.tensors) == list(before.tensors)
        for name, tensor in before.tensors.items():
            assert plan.types[name] == after.tensors[name].type
            if plan.types[name] == tensor.type:
                assert bytes(after.read(name)) == bytes(before.read(name))
        assert after.tensors["position_embd.weight"].type == GGMLType.F16
        for key, field in before.fields.items():
            if key != "general.file_type":
                assert bytes(after.fields[key].raw) == bytes(field.raw)
        assert after.metadata["general.file_type"] == FileType.MOSTLY_Q5_K_S
        assert after.metadata["general.quantization_version"] == 2


def test_a_set_of_shards_becomes_one_file_without_the_keys_of_the_split(tmp_path: Path) -> None:
    whole = sources.write_source(tmp_path / "source.gguf", "llama-rows-of-80")
    paths = write_shards(whole, tmp_path)
    quantize_plainly(whole, tmp_path / "whole.gguf")
    quantize_plainly(paths[0], tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_quantized_source_is_only_quantized_again_when_asked(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "qwen3")
    quantize_plainly(source, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(UsageError, match="quantized already") as caught:
        quantize_plainly(tmp_path / "q8.gguf", tmp_path / "q4.gguf")
    assert "--allow-requantize" in caught.value.next
    plan = quantize_plainly(tmp_path / "q8.gguf", tmp_path / "q4.gguf", allow_requantize=True)
    assert plan.types["blk.4.attn_q.weight"] == GGMLType.Q4_K
    quantize_plainly(tmp_path / "q8.gguf", tmp_path / "same.gguf", "Q8_0")
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()


@pytest.mark.parametrize("word", ["Q4_K_M", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("tensor", ["blk.2.attn_q.weight", "blk.2.ffn_norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, word: str, tensor: str, value: float) -> None:
    def spoil(name: str, values: np.ndarray) -> np.ndarray:
        if name == tensor:
            values.reshape(-1)[17] = value
        return values

    source = sources.write_source(tmp_path / "source.gguf", "qwen3", spoil)
    with pytest.raises(GGUFError, match=tensor):
        quantize_plainly(source, tmp_path / "out.gguf", word)
    assert not (tmp_path / "out.gguf").exists()


def test_a_weight_too_large_for_f16_is_refused_and_bf16_takes_it(tmp_path: Path) -> None:
    def grow(name: str, values: np.ndarray) -> np.ndarray:
        return values * np.float32(2**17) if name == "blk.0.attn_k.weight" else values

    source = sources.write_source(tmp_path / "source.gguf", "qwen3", grow)
    with pytest.raises(GGUFError, match=r"'blk\.0\.attn_k\.weight'.*F16") as caught:
        quantize_plainly(source, tmp_path / "out.gguf", "F16")
    assert "bf16" in caught.value.next
    quantize_plainly(source, tmp_path / "out.gguf", "BF16")


def test_an_imatrix_of_another_model_is_refused_before_work(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "llama-rows-of-288")
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / "i.gguf", "qwen3"))
    with open_gguf(source) as opened, pytest.raises(FormatError, match=r"256 columns .* has 288"):
        plan_quantization(opened, QuantizeOptions(FileType.MOSTLY_Q4_K_M, imatrix=imatrix))


def test_an_imatrix_that_is_not_finite_is_refused_before_work(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "qwen3")
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / "i.gguf", "qwen3"))
    imatrix.entries["blk.1.ffn_up.weight"].sums[0, 3] = np.nan
    with open_gguf(source) as opened, pytest.raises(FormatError, match=r"blk\.1\.ffn_up\.weight"):
        plan_quantization(opened, QuantizeOptions(FileType.MOSTLY_Q4_K_M, imatrix=imatrix))


def test_fallbacks_and_tensors_without_weights_are_counted(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source.gguf", "llama-rows-of-288")
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / "i.gguf", "llama-rows-of-288"))
    partial = Imatrix({"blk.0.attn_q.weight": imatrix.entries["blk.0.attn_q.weight"]}, file_name="i.gguf")
    with open_gguf(source) as opened:
        plan = plan_quantization(opened, QuantizeOptions(FileType.MOSTLY_Q4_K_M, imatrix=partial))
    assert len(plan.fallbacks) == 8 * 7 + 1
    assert len(plan.unweighted) == 8 * 7 - 1
    assert [said[:2] for said in plan.warnings] == ["57", "Th"]


def test_whole_numbers_are_never_quantized(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 256), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="I32"):
        quantize_plainly(tmp_path / "source.gguf", tmp_path / "out.gguf")
