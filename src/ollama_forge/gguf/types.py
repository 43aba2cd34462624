"""The number tables of GGUF: tensor types, value types and file types, and the sizes that follow from them.

In: type numbers or the words a user types. Out: enums and byte counts. It knows no file and no model.
Facts: ggml/include/ggml.h, ggml/src/ggml-common.h, ggml/include/gguf.h and include/llama.h of llama.cpp.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from enum import IntEnum

from ollama_forge.errors import UnsupportedError, UsageError


class GGMLType(IntEnum):
    """How a tensor's elements are encoded (`enum ggml_type`; the gaps are types that llama.cpp removed)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


class ValueType(IntEnum):
    """The type of a metadata value (`enum gguf_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class FileType(IntEnum):
    """The mix of tensor types that `general.file_type` announces (`enum llama_ftype`)."""

    ALL_F32 = 0
    MOSTLY_F16 = 1
    MOSTLY_Q4_0 = 2
    MOSTLY_Q4_1 = 3
    MOSTLY_Q8_0 = 7
    MOSTLY_Q5_0 = 8
    MOSTLY_Q5_1 = 9
    MOSTLY_Q2_K = 10
    MOSTLY_Q3_K_S = 11
    MOSTLY_Q3_K_M = 12
    MOSTLY_Q3_K_L = 13
    MOSTLY_Q4_K_S = 14
    MOSTLY_Q4_K_M = 15
    MOSTLY_Q5_K_S = 16
    MOSTLY_Q5_K_M = 17
    MOSTLY_Q6_K = 18
    MOSTLY_IQ2_XXS = 19
    MOSTLY_IQ2_XS = 20
    MOSTLY_Q2_K_S = 21
    MOSTLY_IQ3_XS = 22
    MOSTLY_IQ3_XXS = 23
    MOSTLY_IQ1_S = 24
    MOSTLY_IQ4_NL = 25
    MOSTLY_IQ3_S = 26
    MOSTLY_IQ3_M = 27
    MOSTLY_IQ2_S = 28
    MOSTLY_IQ2_M = 29
    MOSTLY_IQ4_XS = 30
    MOSTLY_IQ1_M = 31
    MOSTLY_BF16 = 32
    MOSTLY_TQ1_0 = 36
    MOSTLY_TQ2_0 = 37
    MOSTLY_MXFP4_MOE = 38
    MOSTLY_NVFP4 = 39
    MOSTLY_Q1_0 = 40
    MOSTLY_Q2_0 = 41
    GUESSED = 1024


BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.F64: (1, 8),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 36),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
    GGMLType.NVFP4: (64, 36),
    GGMLType.Q1_0: (128, 18),
    GGMLType.Q2_0: (64, 18),
}
"""Type -> (elements in a block, bytes of a block). A block never crosses a row."""

VALUE_FORMATS: dict[ValueType, str] = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
"""`struct` formats of the values whose size is fixed."""

VALUE_BYTES: dict[ValueType, int] = {
    ValueType.UINT8: 1,
    ValueType.INT8: 1,
    ValueType.UINT16: 2,
    ValueType.INT16: 2,
    ValueType.UINT32: 4,
    ValueType.INT32: 4,
    ValueType.FLOAT32: 4,
    ValueType.BOOL: 1,
    ValueType.UINT64: 8,
    ValueType.INT64: 8,
    ValueType.FLOAT64: 8,
}

# The words `llama-quantize` takes for the K mixes without a size letter.
_FILE_TYPE_ALIASES = {
    "Q3_K": FileType.MOSTLY_Q3_K_M,
    "Q4_K": FileType.MOSTLY_Q4_K_M,
    "Q5_K": FileType.MOSTLY_Q5_K_M,
    "MXFP4": FileType.MOSTLY_MXFP4_MOE,
    "FP32": FileType.ALL_F32,
    "FP16": FileType.MOSTLY_F16,
}


def block_elements(type: GGMLType) -> int:
    """Elements in one block; a row's length must be a multiple of it."""
    return BLOCKS[type][0]


def block_bytes(type: GGMLType) -> int:
    """Bytes of one block."""
    return BLOCKS[type][1]


def bits_per_weight(type: GGMLType) -> float:
    """Bits that one element takes, block scales included."""
    elements, size_bytes = BLOCKS[type]
    return 8 * size_bytes / elements


def is_quantized(type: GGMLType) -> bool:
    """Whether the type packs several elements into a block."""
    return BLOCKS[type][0] > 1


def row_bytes(type: GGMLType, n_columns: int) -> int:
    """Bytes of one row.

    Raises:
        UnsupportedError: the row does not divide into whole blocks.
    """
    elements, size_bytes = BLOCKS[type]
    if n_columns < 0 or n_columns % elements:
        raise UnsupportedError(
            f"A row of {n_columns} elements cannot be stored as {type.name}",
            why=f"{type.name} packs blocks of {elements} elements, and {n_columns} is not a multiple of {elements}.",
            next="Choose a type whose block divides the row, for example q8_0 (32) or f16 (1).",
        )
    return n_columns // elements * size_bytes


def tensor_bytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor.

    Args:
        type: the encoding.
        shape: row-major, the row's length last; `()` is one element.

    Raises:
        UnsupportedError: a row does not divide into whole blocks.
    """
    if not shape:
        return row_bytes(type, 1)
    return row_bytes(type, shape[-1]) * math.prod(shape[:-1])


def parse_type(text: str) -> GGMLType:
    """The tensor type that a user typed, upper or lower case.

    Raises:
        UsageError: no such type; lists those that exist.
    """
    found = GGMLType.__members__.get(text.strip().upper())
    if found is None:
        raise UsageError(
            f"There is no tensor type {text!r}",
            why="Known types: " + " ".join(name.lower() for name in GGMLType.__members__) + ".",
            next="Use one of them, for example q6_k.",
        )
    return found


def parse_file_type(text: str) -> FileType:
    """The file type that a user typed (`q4_k_m`, `F16`), upper or lower case.

    Raises:
        UsageError: no such type; lists those that exist.
    """
    word = text.strip().upper()
    found = _FILE_TYPE_WORDS.get(word, _FILE_TYPE_ALIASES.get(word))
    if found is None:
        begun = [name for name in _FILE_TYPE_WORDS if name.startswith(word)] if word else []
        near = begun or difflib.get_close_matches(word, _FILE_TYPE_WORDS, n=3)
        raise UsageError(
            f"There is no file type {text!r}",
            why="Known file types: " + " ".join(name.lower() for name in _FILE_TYPE_WORDS) + ".",
            next=f"Did you mean {' or '.join(near)}?" if near else "Use one of them, for example Q4_K_M.",
        )
    return found


def file_type_name(type: FileType | int) -> str:
    """`Q4_K_M`, `F16`, ...; `unknown` for a number that llama.cpp does not assign."""
    return _FILE_TYPE_NAMES.get(int(type), "unknown")


_FILE_TYPE_NAMES = {
    int(type): type.name.removeprefix("MOSTLY_").removeprefix("ALL_") for type in FileType if type != FileType.GUESSED
}
_FILE_TYPE_WORDS = {name: FileType(number) for number, name in _FILE_TYPE_NAMES.items()}
