"""The one door to ggml: quantize and dequantize rows with the very code that llama.cpp and Ollama run.

In: float32 arrays or stored blocks. Out: stored blocks or float32 arrays. The functions come from the shared library
inside the `xllamacpp` package (or the ggml-base library that OLLAMA_FORGE_GGML_LIBRARY names), called through ctypes,
which releases the GIL; rows are split over threads. Where none exports them, `portable` does what it can.
ggml aborts the process when its assumptions fail, so every argument is checked here first.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import GGUFError, UnsupportedError
from ollama_forge.gguf import portable
from ollama_forge.gguf.types import BLOCKS, GGMLType, is_quantized, row_bytes, tensor_bytes

LIBRARY_VARIABLE = "OLLAMA_FORGE_GGML_LIBRARY"
IMATRIX_TYPES = frozenset({GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S})
"""Types that ggml refuses to quantize without an importance matrix (`ggml_quantize_requires_imatrix`)."""

MAX_WEIGHT = 32768.0
"""The largest weight that a block type takes: scales are float16, and ggml's sums of squares overflow beyond."""

_MAX_IMPORTANCE = 1e16  # importance * weight**2: above it ggml's float32 sums overflow and its assertions abort
_TARGET_ELEMENTS = 1 << 19  # per call: small enough to share out evenly, and far below ggml's int counters
_MAX_HELPERS = 256  # they begin when they are needed
_PLAIN = {GGMLType.I8: "i1", GGMLType.I16: "<i2", GGMLType.I32: "<i4", GGMLType.I64: "<i8", GGMLType.F64: "<f8"}
_NOT_WRITTEN = frozenset({*_PLAIN, GGMLType.Q8_1, GGMLType.Q8_K})
_HALF_ROWS = {
    GGMLType.F16: ("ggml_fp16_to_fp32_row", "ggml_fp32_to_fp16_row"),
    GGMLType.BF16: ("ggml_bf16_to_fp32_row", "ggml_fp32_to_bf16_row_ref"),
}

# The IQ types need tables that take seconds to build, once in a process; ggml's own lock for them spins.
_TABLES_LOCK = threading.Lock()

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NativeLibrary:
    """The library in use; `handle` is None where there is none, and `reason` says why."""

    path: Path | None
    handle: ctypes.CDLL | None
    reason: str

    def find(self, symbol: str) -> Any:
        """The function of that name, or None."""
        return getattr(self.handle, symbol, None) if self.handle is not None else None


@functools.cache
def open_library() -> NativeLibrary:
    """Load ggml once. Never raises: without it the portable path is used."""
    path = _find_library()
    if path is None:
        return NativeLibrary(None, None, "the package xllamacpp is not installed")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as exc:
        return NativeLibrary(path, None, f"{str(path)!r} cannot be loaded: {exc}")
    if not hasattr(handle, "ggml_quantize_chunk"):
        return NativeLibrary(path, None, f"{str(path)!r} does not export ggml's functions")
    handle.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    handle.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    handle.ggml_quantize_init.argtypes = [ctypes.c_int]
    handle.ggml_quantize_init.restype = None
    return NativeLibrary(path, handle, "")


def can_quantize(type: GGMLType) -> bool:
    """Whether `quantize` can make this type on this machine."""
    return type not in _NOT_WRITTEN and (_has_quantizer(type) or type in portable.QUANTIZE)


def can_dequantize(type: GGMLType) -> bool:
    """Whether `dequantize` can read this type on this machine."""
    return type in _PLAIN or type in portable.DEQUANTIZE or _row_function(_dequantize_symbol(type)) is not None


def usable_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quantize(rows: Floats, type: GGMLType, imatrix: Floats | None = None, n_threads: int | None = None) -> Bytes:
    """Encode rows; the bytes equal `ggml_quantize_chunk`'s.

    F32, F16 and BF16 take any number, as ggml does. Block types refuse NaN, infinity and weights beyond `MAX_WEIGHT`:
    ggml would write blocks that decode to NaN, or abort the process.

    Args:
        rows: float32 [n_rows, n_columns], C-contiguous.
        type: what to write.
        imatrix: float32 [n_columns], finite and not negative: the importance of each column.
        n_threads: at most that many; the usable cores by default.

    Returns:
        uint8 [n_rows, row_bytes(type, n_columns)].

    Raises:
        UnsupportedError: the type cannot be made here, needs an imatrix, or its blocks do not divide the row.
        GGUFError: the arrays are not as described, or hold numbers that the type cannot.
    """
    _require_floats(rows, "The rows to quantize", 2)
    n_rows, n_columns = rows.shape
    out = np.empty((n_rows, row_bytes(type, n_columns)), np.uint8)
    if imatrix is not None:
        imatrix = _checked_imatrix(imatrix, n_columns)
    elif type in IMATRIX_TYPES:
        raise UnsupportedError(
            f"{type.name} cannot be made without an importance matrix",
            why="At so few bits ggml must know which columns matter.",
            next="Make one (ollama-forge imatrix REF -o imatrix.gguf) and add --imatrix imatrix.gguf, or choose a "
            "larger type such as iq4_xs.",
        )
    kernel = _quantize_kernel(type, imatrix)
    largest = 0.0 if imatrix is None or not imatrix.size else float(imatrix.max())

    def encode(start: int, stop: int) -> None:
        part = rows[start:stop]
        if is_quantized(type):
            _require_encodable(part, type, largest)
        kernel(part, out[start:stop])

    if out.size:
        _run_rows(encode, n_rows, n_columns, n_threads)
    return out


def dequantize(
    data: Any, type: GGMLType, shape: Sequence[int], out: Floats | None = None, n_threads: int | None = None
) -> Floats:
    """Decode a tensor's stored bytes; the numbers equal ggml's `dequantize_row_*` bit for bit.

    Args:
        data: a buffer of exactly `tensor_bytes(type, shape)` bytes; it is not copied.
        type: its encoding; any, integers and float64 included.
        shape: row-major.
        out: where to put the result: float32, C-contiguous, of `shape`.
        n_threads: at most that many; the usable cores by default.

    Returns:
        float32 of `shape`: `out` itself when it was given.

    Raises:
        UnsupportedError: the type cannot be decoded here, or its blocks do not divide the row.
        GGUFError: `data` or `out` do not have the size that the shape needs.
    """
    shape = tuple(shape)
    needed = tensor_bytes(type, shape)
    stored = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
    if stored.nbytes != needed:
        raise GGUFError(
            f"A {type.name} tensor of shape {shape} has {needed} bytes, and {stored.nbytes} were given",
            next="Read the tensor again; check that the file is whole.",
        )
    if out is None:
        out = np.empty(shape, np.float32)
    _require_floats(out, "The array to decode into", len(shape))
    if out.shape != shape or not out.flags.writeable:
        raise GGUFError(
            f"The array to decode into has shape {out.shape}, and {shape} is needed",
            why="It must be writable and of the tensor's shape.",
            next="Allocate it with numpy.empty(shape, numpy.float32).",
        )
    kernel = _dequantize_kernel(type)
    block_elements, block_bytes = BLOCKS[type]
    n_blocks = needed // block_bytes
    blocks = _aligned(stored, type).reshape(n_blocks, block_bytes)
    flat = out.reshape(n_blocks, block_elements)
    if n_blocks:
        _run_rows(lambda start, stop: kernel(blocks[start:stop], flat[start:stop]), n_blocks, block_elements, n_threads)
    return out


def _find_library() -> Path | None:
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else bundled_library()


def bundled_library() -> Path | None:
    """The shared library inside the package xllamacpp, llama.cpp whole; None where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for pattern in ("xllamacpp*.so", "xllamacpp*.pyd", "xllamacpp*.dylib"):
            for path in sorted(Path(folder).glob(pattern)):
                return path
    return None


def _symbol_name(type: GGMLType) -> str:
    return type.name.lower().replace("_k", "_K")


def _dequantize_symbol(type: GGMLType) -> str:
    return _HALF_ROWS[type][0] if type in _HALF_ROWS else f"dequantize_row_{_symbol_name(type)}"


def _has_quantizer(type: GGMLType) -> bool:
    if type in _HALF_ROWS:
        return _row_function(_HALF_ROWS[type][1]) is not None
    return open_library().find(f"quantize_{_symbol_name(type)}") is not None


@functools.cache
def _row_function(symbol: str) -> Any:
    """`void f(const void * from, void * to, int64_t n_elements)`, or None."""
    function = open_library().find(symbol)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
    return function


def _quantize_kernel(type: GGMLType, imatrix: Floats | None) -> Callable[[Floats, Bytes], None]:
    if type in _NOT_WRITTEN:
        raise UnsupportedError(
            f"Weights cannot be stored as {type.name}",
            why="ggml uses it for other things and has no encoder for it.",
            next="Choose a type for weights, for example q8_0.",
        )
    if type is GGMLType.F32 or not _has_quantizer(type):
        return _portable_quantizer(type, imatrix)
    if type in _HALF_ROWS:
        convert = _row_function(_HALF_ROWS[type][1])
        return lambda part, target: convert(part.ctypes.data, target.ctypes.data, part.size)
    handle = open_library().handle
    if handle is None:
        raise _unsupported(type, "encode")
    chunk, prepare = handle.ggml_quantize_chunk, handle.ggml_quantize_init
    weights = imatrix.ctypes.data if imatrix is not None else None

    def encode(part: Floats, target: Bytes) -> None:
        n_rows, n_columns = part.shape
        with _TABLES_LOCK:
            prepare(int(type))
        written = chunk(int(type), part.ctypes.data, target.ctypes.data, 0, n_rows, n_columns, weights)
        if written != target.nbytes:
            raise GGUFError(f"ggml wrote {written} bytes of {type.name} where {target.nbytes} were expected")

    return encode


def _portable_quantizer(type: GGMLType, imatrix: Floats | None) -> Callable[[Floats, Bytes], None]:
    encode = portable.QUANTIZE.get(type)
    if encode is None:
        raise _unsupported(type, "encode")
    if imatrix is not None and type in portable.IMATRIX_MATTERS:
        raise _unsupported(type, "encode with an importance matrix")
    block_elements, block_bytes = BLOCKS[type]

    def run(part: Floats, target: Bytes) -> None:
        with np.errstate(all="ignore"):
            target.reshape(-1, block_bytes)[:] = encode(part.reshape(-1, block_elements))

    return run


def _dequantize_kernel(type: GGMLType) -> Callable[[Bytes, Floats], None]:
    if type in _PLAIN:
        plain = np.dtype(_PLAIN[type])
        return lambda part, target: np.copyto(target, part.view(plain), casting="unsafe")
    function = _row_function(_dequantize_symbol(type))
    if function is not None:
        return lambda part, target: function(part.ctypes.data, target.ctypes.data, target.size)
    decode = portable.DEQUANTIZE.get(type)
    if decode is None:
        raise _unsupported(type, "decode")

    def run(part: Bytes, target: Floats) -> None:
        with np.errstate(all="ignore"):
            np.copyto(target, decode(part))

    return run


def _unsupported(type: GGMLType, verb: str) -> UnsupportedError:
    library = open_library()
    return UnsupportedError(
        f"This machine cannot {verb} {type.name}",
        why=f"ggml's own code is needed, and {library.reason or f'{str(library.path)!r} is too old for it'}.",
        next=f"Set {LIBRARY_VARIABLE} to a ggml-base library (Ollama installs one in lib/ollama), or choose q8_0.",
    )


def _run_rows(work: Callable[[int, int], None], n_rows: int, row_elements: int, n_threads: int | None) -> None:
    """Call `work(start, stop)` for pieces of the rows, on several threads when there is enough to do.

    The calling thread works too, and what no helper has begun when it is done is taken back: calls from inside other
    threads, or from a forked process that has none of the helpers, end all the same.
    """
    n_threads = max(1, n_threads if n_threads is not None else usable_cores())
    step = max(1, min(math.ceil(n_rows / n_threads), _TARGET_ELEMENTS // row_elements))
    starts: Iterator[int] = iter(range(0, n_rows, step))
    lock = threading.Lock()

    def work_on() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            work(start, min(start + step, n_rows))

    n_helpers = min(n_threads, math.ceil(n_rows / step)) - 1
    helpers = [_helpers().submit(work_on) for _ in range(n_helpers)]
    try:
        work_on()
    finally:
        with lock:
            starts = iter(())  # where one failed, the others stop
        begun = [helper for helper in helpers if not helper.cancel()]
        concurrent.futures.wait(begun)
    for helper in begun:
        helper.result()


@functools.cache
def _helpers() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that stay: a call may take less time than starting them."""
    return concurrent.futures.ThreadPoolExecutor(_MAX_HELPERS, thread_name_prefix="ggml")


def _aligned(stored: Bytes, type: GGMLType) -> Bytes:
    # C reads float16 scales and float32 values at their natural alignment; files with a tiny alignment may lack it.
    return stored.copy() if stored.ctypes.data % min(8, BLOCKS[type][1] & -BLOCKS[type][1]) else stored


def _require_floats(array: Any, what: str, n_dimensions: int) -> None:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.float32
        or array.ndim != n_dimensions
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else array.__class__.__name__
        raise GGUFError(
            f"{what} must be a C-contiguous float32 array of {n_dimensions} dimensions, not {found}",
            next="Pass numpy.ascontiguousarray(array, numpy.float32).",
        )


def _checked_imatrix(imatrix: Floats, n_columns: int) -> Floats:
    _require_floats(imatrix, "The importance matrix", 1)
    if imatrix.shape[0] != n_columns:
        raise GGUFError(
            f"The importance matrix has {imatrix.shape[0]} columns and the tensor has {n_columns}",
            why="It was made for another model.",
            next="Make one from this model: ollama-forge imatrix REF -o imatrix.gguf",
        )
    if not (np.isfinite(imatrix).all() and (imatrix >= 0).all()):
        raise GGUFError(
            "The importance matrix holds negative numbers, NaN or infinity",
            next="Make it again, from more text: ollama-forge imatrix REF --text FILE -o imatrix.gguf",
        )
    return imatrix


def _require_encodable(part: Floats, type: GGMLType, largest_importance: float) -> None:
    low, high = float(part.min()), float(part.max())
    if not (low >= -MAX_WEIGHT and high <= MAX_WEIGHT):
        worst = "NaN" if math.isnan(low + high) else f"{high if high > -low else low:g}"
        raise GGUFError(
            f"A tensor that holds {worst} cannot be stored as {type.name}",
            why=f"Its blocks hold finite weights up to {MAX_WEIGHT:g}; such a weight is usually damage.",
            next="BF16 and F32 hold such weights (quantize --type bf16, import --quant none, convert without --quant); "
            "but check the source model first."
            if math.isfinite(low + high)
            else "Get the model again, and check it where it came from.",
        )
    if largest_importance * max(high, -low) ** 2 > _MAX_IMPORTANCE:
        raise GGUFError(
            f"The importance matrix (up to {largest_importance:g}) is too large for these weights "
            f"(up to {max(high, -low):g})",
            why="ggml's sums would overflow.",
            next="Make it again (ollama-forge imatrix REF -o imatrix.gguf), or quantize without it.",
        )
