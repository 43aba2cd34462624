import ctypes
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

from ollama_forge.errors import GGUFError, UnsupportedError
from ollama_forge.gguf import native, portable
from ollama_forge.gguf.types import BLOCKS, GGMLType, is_quantized, row_bytes

PLAIN = [GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64, GGMLType.F64]
WRITTEN = [t for t in GGMLType if t not in {*PLAIN, GGMLType.Q8_1, GGMLType.Q8_K}]
BLOCK_TYPES = [t for t in WRITTEN if is_quantized(t)]

TABLE_TYPES = {t for t in BLOCK_TYPES if t.name.startswith(("IQ1", "IQ2", "IQ3"))}  # one test, one process builds them

# Bit patterns of float32 that conversions stumble over: zeros, infinities, NaNs, subnormals, halves between two values.
AWKWARD = (
    "00000000 80000000 7f800000 ff800000 7f800001 7fc00000 ffc12345 00000001 80000001 7f7fffff 477fefff 477ff000 "
    "33000000 33000001 38800000 387fffff 3f808000 3f818000 7f7f8000 00008000"
)
AWKWARD_FLOATS = np.array([int(bits, 16) for bits in AWKWARD.split()], np.uint32).view(np.float32)


def ggml() -> ctypes.CDLL:
    handle = native.open_library().handle
    assert handle is not None
    return handle


def weights(n_rows: int = 37, n_columns: int = 512) -> np.ndarray:
    """Rows of many sizes, of rounded numbers (ties), of zeros and of few distinct values."""
    random = np.random.default_rng(7)
    rows = random.standard_normal((n_rows, n_columns)).astype(np.float32)
    rows *= np.logspace(-9, 3, n_rows, dtype=np.float32)[:, None]
    if n_rows > 4:
        rows[1] = np.round(random.standard_normal(n_columns) * 4) / 2
        rows[2] = 0
        rows[3] = np.sign(rows[3])
        rows[4] = random.integers(-127, 128, n_columns)
    return np.clip(rows, -30000, 30000)


def importance(n_columns: int = 512) -> np.ndarray:
    return np.random.default_rng(8).exponential(size=n_columns).astype(np.float32)


def test_sizes_of_all_types_are_those_of_the_library() -> None:
    ggml().ggml_blck_size.restype = ctypes.c_int64
    ggml().ggml_type_size.restype = ctypes.c_size_t
    found = {t: (ggml().ggml_blck_size(int(t)), ggml().ggml_type_size(int(t))) for t in GGMLType}
    assert found == BLOCKS


def test_types_that_need_an_imatrix_are_those_of_the_library() -> None:
    ggml().ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    assert {t for t in GGMLType if ggml().ggml_quantize_requires_imatrix(int(t))} == native.IMATRIX_TYPES


def check_encoding(type: GGMLType, matrix: np.ndarray | None) -> None:
    rows = weights()
    expected = np.empty((len(rows), row_bytes(type, rows.shape[1])), np.uint8)
    pointer = matrix.ctypes.data if matrix is not None else None
    ggml().ggml_quantize_chunk(int(type), rows.ctypes.data, expected.ctypes.data, 0, *rows.shape, pointer)
    for n_threads in (1, 3, None):
        np.testing.assert_array_equal(native.quantize(rows, type, matrix, n_threads), expected, err_msg=type.name)


@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("type", sorted({*WRITTEN} - TABLE_TYPES), ids=lambda t: t.name)
def test_rows_split_over_threads_give_ggmls_bytes(type: GGMLType, with_imatrix: bool) -> None:
    check_encoding(type, importance() if with_imatrix else None)


@pytest.mark.slow
def test_rows_split_over_threads_give_ggmls_bytes_where_ggml_needs_tables() -> None:
    for type in sorted(TABLE_TYPES):
        check_encoding(type, importance())
        if type not in native.IMATRIX_TYPES:
            check_encoding(type, None)


def stored_blocks(type: GGMLType) -> np.ndarray:
    """Blocks of random bytes: every level occurs, and scales of every size, infinite and NaN ones too."""
    return np.random.default_rng(2).integers(0, 256, (500, BLOCKS[type][1]), np.uint8)


@pytest.mark.parametrize("type", sorted({*WRITTEN} - {GGMLType.Q1_0, GGMLType.Q2_0}), ids=lambda t: t.name)
def test_decoding_gives_what_gguf_py_decodes(type: GGMLType) -> None:
    stored = stored_blocks(type)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType(int(type)))
    found = native.dequantize(stored, type, (len(stored), BLOCKS[type][0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_types_that_gguf_py_cannot_decode_have_their_documented_levels() -> None:
    two_bits = np.concatenate([np.float16([0.5]).view(np.uint8), np.full(16, 0b11_10_01_00, np.uint8)])
    found = native.dequantize(two_bits, GGMLType.Q2_0, (64,))
    np.testing.assert_array_equal(found, np.tile(np.float32([-0.5, 0, 0.5, 1]), 16))
    one_bit = np.concatenate([np.float16([0.5]).view(np.uint8), np.full(16, 0b1010_0110, np.uint8)])
    found = native.dequantize(one_bit, GGMLType.Q1_0, (128,))
    np.testing.assert_array_equal(found, np.tile(np.float32([-1, 1, 1, -1, -1, 1, -1, 1]) / 2, 16))


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda t: t.name)
def test_decoding_on_many_threads_equals_decoding_on_one(type: GGMLType) -> None:
    stored = np.tile(stored_blocks(type), (40, 1))
    shape = (len(stored), BLOCKS[type][0])
    one = native.dequantize(stored, type, shape, n_threads=1)
    many = native.dequantize(stored, type, shape, n_threads=5)
    np.testing.assert_array_equal(one.view(np.uint32), many.view(np.uint32))


def _large_q8() -> tuple[np.ndarray, np.ndarray]:
    """(encoded rows, numbers): enough of them to be shared out over several threads."""
    rows = np.random.default_rng(5).standard_normal((2048, 1024), np.float32)
    encoded = native.quantize(rows, GGMLType.Q8_0, n_threads=1)
    return encoded, native.dequantize(encoded, GGMLType.Q8_0, rows.shape, n_threads=1)


def test_many_threads_may_decode_on_many_threads_at_once() -> None:
    encoded, numbers = _large_q8()
    decode = lambda _: native.dequantize(encoded, GGMLType.Q8_0, numbers.shape, n_threads=8)  # noqa: E731
    with ThreadPoolExecutor(16) as pool:
        assert all(np.array_equal(decoded, numbers) for decoded in pool.map(decode, range(64)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_decodes_though_its_parents_threads_are_not_there() -> None:
    encoded, numbers = _large_q8()
    native.dequantize(encoded, GGMLType.Q8_0, numbers.shape, n_threads=4)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            decoded = native.dequantize(encoded, GGMLType.Q8_0, numbers.shape, n_threads=4)
            code = 0 if np.array_equal(decoded, numbers) else 1
        finally:
            os._exit(code)  # whatever happened: the child must not go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_bad_number_among_the_last_rows_is_refused_on_many_threads_too() -> None:
    rows = np.zeros((4096, 1024), np.float32)
    rows[-1, -1] = np.nan
    with pytest.raises(GGUFError, match="NaN"):
        native.quantize(rows, GGMLType.Q8_0, n_threads=4)


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name)
def test_plain_floats_keep_every_awkward_number_as_ggml_does(type: GGMLType) -> None:
    random = np.random.default_rng(1).integers(0, 1 << 32, 50000, np.uint32).view(np.float32)
    values = np.concatenate([AWKWARD_FLOATS, random])[None]
    expected = np.empty((1, row_bytes(type, values.shape[1])), np.uint8)
    ggml().ggml_quantize_chunk(int(type), values.ctypes.data, expected.ctypes.data, 0, *values.shape, None)
    stored = native.quantize(values, type)
    np.testing.assert_array_equal(stored, expected)
    with np.errstate(all="ignore"):
        encoded = portable.QUANTIZE[type](values.reshape(-1, 1)).reshape(1, -1)
    np.testing.assert_array_equal(encoded, expected)
    back = native.dequantize(stored, type, values.shape)
    again = portable.DEQUANTIZE[type](stored.reshape(-1, BLOCKS[type][1])).reshape(values.shape)
    np.testing.assert_array_equal(again.view(np.uint32), back.view(np.uint32))


@pytest.mark.parametrize("type", [GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name)
def test_every_16_bit_number_is_decoded_as_ggml_does(type: GGMLType) -> None:
    stored = np.arange(65536, dtype="<u2")
    native_bits = native.dequantize(stored, type, (65536,)).view(np.uint32)
    portable_bits = portable.DEQUANTIZE[type](stored.view(np.uint8).reshape(-1, 2)).ravel().view(np.uint32)
    np.testing.assert_array_equal(native_bits, portable_bits)
    if type is GGMLType.BF16:
        np.testing.assert_array_equal(native_bits, stored.astype(np.uint32) << 16)


@pytest.mark.parametrize("type", sorted(set(portable.QUANTIZE) & set(BLOCK_TYPES)), ids=lambda t: t.name)
def test_the_portable_encoder_gives_ggmls_bytes(type: GGMLType) -> None:
    rows = np.vstack([weights(), np.float32(1e-42) * np.sign(weights(1))])
    rows = np.vstack([rows, np.zeros((1, 512), np.float32), np.full((1, 512), -0.0, np.float32)])
    with np.errstate(all="ignore"):
        found = portable.QUANTIZE[type](rows.reshape(-1, 32)).reshape(len(rows), -1)
    np.testing.assert_array_equal(found, native.quantize(rows, type))


@pytest.mark.parametrize("type", sorted(set(portable.DEQUANTIZE) & set(BLOCK_TYPES)), ids=lambda t: t.name)
def test_the_portable_decoder_gives_ggmls_bits(type: GGMLType) -> None:
    stored = np.vstack([stored_blocks(type), native.quantize(weights(), type).reshape(-1, BLOCKS[type][1])])
    expected = native.dequantize(stored, type, (len(stored), BLOCKS[type][0]))
    with np.errstate(invalid="ignore"):
        found = portable.DEQUANTIZE[type](stored)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


def test_decoding_goes_into_the_array_it_is_given() -> None:
    rows = weights()
    stored = native.quantize(rows, GGMLType.Q4_K).tobytes()
    out = np.full(rows.shape, 7, np.float32)
    assert native.dequantize(stored, GGMLType.Q4_K, rows.shape, out) is out
    np.testing.assert_array_equal(out, native.dequantize(memoryview(stored), GGMLType.Q4_K, rows.shape))
    assert native.dequantize(stored, GGMLType.Q4_K, (1, 37, 2, 256)).shape == (1, 37, 2, 256)


def test_bytes_that_are_not_aligned_are_decoded() -> None:
    values = np.arange(64, dtype=np.float32)
    for type in (GGMLType.F32, GGMLType.F16, GGMLType.Q8_0):
        stored = b"x" + native.quantize(values[None], type).tobytes()
        found = native.dequantize(memoryview(stored)[1:], type, (64,))
        np.testing.assert_allclose(found, values, atol=0.3)


@pytest.mark.parametrize("type", PLAIN, ids=lambda t: t.name)
def test_integers_and_doubles_are_decoded(type: GGMLType) -> None:
    dtype = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}[type.name]
    values = np.array([[-128, 0, 3], [4, 5, 127]], dtype)
    np.testing.assert_array_equal(native.dequantize(values, type, (2, 3)), values.astype(np.float32))


def test_nothing_to_do_is_done() -> None:
    assert native.quantize(np.empty((0, 64), np.float32), GGMLType.Q8_0).shape == (0, 68)
    assert native.quantize(np.empty((3, 0), np.float32), GGMLType.Q8_0).shape == (3, 0)
    assert native.dequantize(b"", GGMLType.Q8_0, (0, 64)).shape == (0, 64)
    assert native.dequantize(np.float32([2.5]), GGMLType.F32, ()).shape == ()


@pytest.mark.parametrize("type", [t for t in GGMLType if t not in WRITTEN], ids=lambda t: t.name)
def test_types_without_an_encoder_are_refused(type: GGMLType) -> None:
    assert not native.can_quantize(type)
    with pytest.raises(UnsupportedError, match=type.name):
        native.quantize(weights(), type)


def test_what_each_type_can_do_is_known_beforehand() -> None:
    assert all(native.can_quantize(t) for t in WRITTEN)
    assert [t.name for t in GGMLType if not native.can_dequantize(t)] == ["Q8_1"]
    with pytest.raises(UnsupportedError, match="Q8_1"):
        native.dequantize(bytes(36), GGMLType.Q8_1, (32,))


@pytest.mark.parametrize("type", sorted(native.IMATRIX_TYPES), ids=lambda t: t.name)
def test_a_missing_imatrix_is_refused_where_one_is_needed(type: GGMLType) -> None:
    with pytest.raises(UnsupportedError, match="--imatrix"):
        native.quantize(weights(), type)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 32769.0, -1e30])
@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda t: t.name)
def test_weights_that_would_abort_or_spoil_a_block_are_refused(type: GGMLType, value: float) -> None:
    rows = weights()
    rows[20, 300] = value
    with pytest.raises(GGUFError, match=f"cannot be stored as {type.name}"):
        native.quantize(rows, type, importance())


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.ones(511, np.float32), "511 columns and the tensor has 512"),
        (np.full(512, -1, np.float32), "negative"),
        (np.full(512, np.nan, np.float32), "NaN"),
        (np.full(512, np.inf, np.float32), "infinity"),
        (np.full(512, 1e30, np.float32), "too large for these weights"),
        (np.ones(512, np.float64), "float64"),
        (np.ones((1, 512), np.float32), "1 dimensions"),
        (np.ones(1024, np.float32)[::2], "C-contiguous"),
    ],
)
def test_an_imatrix_that_does_not_fit_is_refused(matrix: np.ndarray, words: str) -> None:
    with pytest.raises(GGUFError, match=words):
        native.quantize(weights(), GGMLType.Q4_K, matrix)


@pytest.mark.parametrize(
    "rows",
    [
        np.ones((2, 64), np.float64),
        np.ones(64, np.float32),
        np.ones((2, 2, 64), np.float32),
        np.ones((64, 2), np.float32).T,
        np.ones((2, 128), np.float32)[:, ::2],
        [[1.0] * 64],
    ],
    ids=["float64", "one dimension", "three dimensions", "transposed", "strided", "list"],
)
def test_arrays_of_another_kind_are_refused(rows: object) -> None:
    with pytest.raises(GGUFError, match="C-contiguous float32"):
        native.quantize(rows, GGMLType.Q8_0)  # type: ignore[arg-type]


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="100 elements cannot be stored as Q4_K"):
        native.quantize(np.ones((2, 100), np.float32), GGMLType.Q4_K)
    with pytest.raises(UnsupportedError, match="100 elements cannot be stored as Q4_K"):
        native.dequantize(bytes(144), GGMLType.Q4_K, (100,))


@pytest.mark.parametrize("size_bytes", [0, 143, 145, 288])
def test_bytes_of_another_size_are_refused(size_bytes: int) -> None:
    with pytest.raises(GGUFError, match=f"has 144 bytes, and {size_bytes} were given"):
        native.dequantize(bytes(size_bytes), GGMLType.Q4_K, (1, 256))


def test_a_target_of_another_kind_is_refused() -> None:
    stored = native.quantize(np.ones((2, 256), np.float32), GGMLType.Q4_K)
    frozen = np.empty((2, 256), np.float32)
    frozen.flags.writeable = False
    for out in (np.empty((1, 512), np.float32), np.empty((2, 256), np.float64), frozen):
        with pytest.raises(GGUFError, match="array to decode into"):
            native.dequantize(stored, GGMLType.Q4_K, (2, 256), out)


WITHOUT_GGML = """
import sys
import numpy as np
from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf import native
from ollama_forge.gguf.types import GGMLType
rows = np.load(sys.argv[1])
np.savez(sys.argv[2], **{t.name: native.quantize(rows, t) for t in GGMLType if native.can_quantize(t)})
print(*[t.name for t in GGMLType if not native.can_dequantize(t)])
for action in (
    lambda: native.quantize(rows, GGMLType.Q4_K),
    lambda: native.quantize(rows, GGMLType.Q4_0, np.ones(512, np.float32)),
    lambda: native.dequantize(bytes(84), GGMLType.Q2_K, (256,)),
):
    try:
        action()
    except UnsupportedError as exc:
        print(str(exc).replace(chr(10), " "))
"""


@pytest.mark.parametrize("library", ["absent.so", "not-a-library.so", "other-library.so"])
def test_without_ggml_the_portable_path_gives_the_same_bytes(tmp_path: Path, library: str) -> None:
    path = tmp_path / library
    if library == "not-a-library.so":
        path.write_bytes(b"not a library")
    if library == "other-library.so":
        path = Path(ctypes.__file__)
        path = Path(sys.modules["_ctypes"].__file__ or path)
    np.save(tmp_path / "rows.npy", weights())
    command = [sys.executable, "-c", WITHOUT_GGML, str(tmp_path / "rows.npy"), str(tmp_path / "out.npz")]
    environment = {**os.environ, native.LIBRARY_VARIABLE: str(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    undecodable, *refusals = done.stdout.splitlines()
    made = np.load(tmp_path / "out.npz")
    assert set(made) == {t.name for t in portable.QUANTIZE}
    for name in made:
        np.testing.assert_array_equal(made[name], native.quantize(weights(), GGMLType[name]))
    decodable = {*portable.DEQUANTIZE, *PLAIN}
    assert undecodable.split() == [t.name for t in GGMLType if t not in decodable]
    assert [" ".join(line.split()[3:5]) for line in refusals] == ["encode Q4_K", "encode with", "decode Q2_K"]
    assert all(native.LIBRARY_VARIABLE in line and str(path) in line for line in refusals)


def test_the_engine_is_not_imported_to_reach_its_library() -> None:
    code = (
        "import sys, numpy; from ollama_forge.gguf import native; from ollama_forge.gguf.types import GGMLType;"
        "native.quantize(numpy.ones((1, 256), numpy.float32), GGMLType.Q4_K); print('xllamacpp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
