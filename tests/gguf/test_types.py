import gguf
import pytest

from ollama_forge.errors import UnsupportedError, UsageError
from ollama_forge.gguf.types import (
    BLOCKS,
    VALUE_BYTES,
    VALUE_FORMATS,
    FileType,
    GGMLType,
    ValueType,
    bits_per_weight,
    block_bytes,
    block_elements,
    file_type_name,
    is_quantized,
    parse_file_type,
    parse_type,
    row_bytes,
    tensor_bytes,
)


def test_tensor_types_have_the_numbers_of_llama_cpp() -> None:
    theirs = {t.name: int(t) for t in gguf.GGMLQuantizationType}
    ours = {t.name: int(t) for t in GGMLType}
    assert {name: ours.get(name) for name in theirs} == theirs
    assert set(ours) - set(theirs) <= {"Q2_0"}


def test_blocks_have_the_sizes_of_llama_cpp() -> None:
    # gguf-py still counts Q8_1's two scales as float32; ggml-common.h has them as float16. Q8_1 is never in a file.
    theirs = {t.name: sizes for t, sizes in gguf.GGML_QUANT_SIZES.items() if t.name != "Q8_1"}
    assert {name: BLOCKS[GGMLType[name]] for name in theirs} == theirs
    assert set(BLOCKS) == set(GGMLType)


def test_value_types_have_the_numbers_of_llama_cpp() -> None:
    assert {t.name: int(t) for t in ValueType} == {t.name: int(t) for t in gguf.GGUFValueType}


def test_every_value_of_fixed_size_has_a_size_and_a_format() -> None:
    assert set(VALUE_FORMATS) == set(VALUE_BYTES) == set(ValueType) - {ValueType.STRING, ValueType.ARRAY}


def test_file_types_have_the_numbers_of_llama_cpp() -> None:
    theirs = {t.name: int(t) for t in gguf.LlamaFileType}
    ours = {t.name: int(t) for t in FileType}
    assert {name: ours.get(name) for name in theirs} == theirs
    assert set(ours) - set(theirs) <= {"MOSTLY_Q2_0"}


def test_a_tensor_takes_its_rows_blocks() -> None:
    assert (block_elements(GGMLType.Q4_K), block_bytes(GGMLType.Q4_K)) == (256, 144)
    assert row_bytes(GGMLType.Q4_K, 512) == 288
    assert tensor_bytes(GGMLType.Q4_K, (3, 5, 256)) == 15 * 144
    assert tensor_bytes(GGMLType.F32, ()) == 4
    assert tensor_bytes(GGMLType.F16, (7,)) == 14
    assert tensor_bytes(GGMLType.F16, (0, 7)) == 0
    assert bits_per_weight(GGMLType.Q8_0) == 8.5
    assert [t.name for t in (GGMLType.F32, GGMLType.I8, GGMLType.Q8_0, GGMLType.IQ1_S) if is_quantized(t)] == [
        "Q8_0",
        "IQ1_S",
    ]


@pytest.mark.parametrize("columns", [31, 33, -32, 1])
def test_a_row_that_does_not_divide_is_refused_with_both_numbers(columns: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"{columns} elements[\s\S]*multiple of 32"):
        row_bytes(GGMLType.Q8_0, columns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q4_k_m", FileType.MOSTLY_Q4_K_M),
        ("Q4_K_M", FileType.MOSTLY_Q4_K_M),
        ("q4_k", FileType.MOSTLY_Q4_K_M),
        ("Q5_K", FileType.MOSTLY_Q5_K_M),
        ("q3_k", FileType.MOSTLY_Q3_K_M),
        ("f32", FileType.ALL_F32),
        ("F16", FileType.MOSTLY_F16),
        ("bf16", FileType.MOSTLY_BF16),
        (" iq4_xs ", FileType.MOSTLY_IQ4_XS),
    ],
)
def test_a_file_type_is_read_as_users_type_it(text: str, expected: FileType) -> None:
    assert parse_file_type(text) is expected


def test_every_file_type_survives_its_own_name() -> None:
    for file_type in set(FileType) - {FileType.GUESSED}:
        assert parse_file_type(file_type_name(file_type)) is file_type
    assert file_type_name(5) == file_type_name(FileType.GUESSED) == "unknown"


def test_every_tensor_type_survives_its_own_name() -> None:
    for tensor_type in GGMLType:
        assert parse_type(tensor_type.name.lower()) is tensor_type


@pytest.mark.parametrize("text", ["", "q4", "Q4_K_X", "guessed", "0"])
def test_an_unknown_type_is_refused_with_the_list_of_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        parse_file_type(text)
    with pytest.raises(UsageError, match="q6_k"):
        parse_type(text)
