"""The part of the engine's child process that answers with logits: llama.cpp's own C functions, called through ctypes.

In: JSON lines on stdin (tokens, where they stand, which of them are asked about). Out: for each a JSON line, then
float32 logits, `[asked, vocabulary]`, as raw bytes. llama.cpp's server tells probabilities of what it generates only,
so its library is called here. Facts: include/llama.h of b11549. Of the two parameter structures only the first
fields are touched, which have kept their places since 2024, and only where they hold the defaults that they should.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
_GPU_LAYERS_OFFSET = 2 * struct.calcsize("P")  # behind `devices` and `tensor_buft_overrides`
_GPU_LAYERS_DEFAULTS = (-1, 0, 999)

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int32


class _Parameters(ctypes.Structure):
    """A structure that llama.cpp hands out and takes by value; larger than any of its versions."""

    _fields_ = (("content", ctypes.c_uint8 * 2048),)


class _Batch(ctypes.Structure):
    """`llama_batch`: tokens, their positions and sequences, and whether logits are wanted behind each."""

    _fields_ = (
        ("n_tokens", _Int),
        ("token", ctypes.POINTER(_Int)),
        ("embd", _Pointer),
        ("pos", ctypes.POINTER(_Int)),
        ("n_seq_id", ctypes.POINTER(_Int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_Int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_Pointer, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (_Pointer, (_Pointer, _Parameters)),
    "llama_set_n_threads": (None, (_Pointer, _Int, _Int)),
    "llama_model_get_vocab": (_Pointer, (_Pointer,)),
    "llama_vocab_n_tokens": (_Int, (_Pointer,)),
    "llama_adapter_lora_init": (_Pointer, (_Pointer, ctypes.c_char_p)),
    "llama_set_adapters_lora": (_Int, (_Pointer, _Pointer, ctypes.c_size_t, _Pointer)),
    "llama_batch_init": (_Batch, (_Int, _Int, _Int)),
    "llama_get_memory": (_Pointer, (_Pointer,)),
    "llama_memory_clear": (None, (_Pointer, ctypes.c_bool)),
    "llama_decode": (_Int, (_Pointer, _Batch)),
    "llama_get_logits": (_Pointer, (_Pointer,)),
}
SYMBOLS = tuple(_SIGNATURES)
"""What the library must export."""


class LogitsModel:
    """A model and one sequence of tokens in it.

    Raises:
        RuntimeError: llama.cpp does not load it; its log says why.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._library = _Library(Path(job["library"]))
        self._library.llama_backend_init()
        self._model = self._library.llama_model_load_from_file(os.fsencode(job["model"]), self._model_parameters(job))
        if not self._model:
            raise RuntimeError("llama.cpp did not load the model")
        self._context = self._library.llama_init_from_model(self._model, self._context_parameters(job))
        if not self._context:
            raise RuntimeError("llama.cpp made no context for the model")
        self._library.llama_set_n_threads(self._context, job["n_threads"], job["n_threads"])
        self._put_on(job["adapters"])
        self.n_vocab = int(self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model)))
        self._batch = self._library.llama_batch_init(job["n_batch"], 0, 1)

    def _model_parameters(self, job: Mapping[str, Any]) -> _Parameters:
        parameters = self._library.llama_model_default_params()
        if job["n_gpu_layers"] is not None:
            (found,) = struct.unpack_from("i", parameters.content, _GPU_LAYERS_OFFSET)
            if found not in _GPU_LAYERS_DEFAULTS:
                raise RuntimeError(f"llama.cpp's model parameters are laid out in another way ({found})")
            struct.pack_into("i", parameters.content, _GPU_LAYERS_OFFSET, job["n_gpu_layers"])
        return parameters

    def _context_parameters(self, job: Mapping[str, Any]) -> _Parameters:
        parameters = self._library.llama_context_default_params()
        found = struct.unpack_from("4I", parameters.content)
        if found != _CONTEXT_DEFAULTS:
            raise RuntimeError(f"llama.cpp's context parameters are laid out in another way {found}")
        struct.pack_into("3I", parameters.content, 0, job["context_length"], job["n_batch"], job["n_batch"])
        return parameters

    def _put_on(self, adapters: list[tuple[str, float]]) -> None:
        if not adapters:
            return
        loaded = [self._library.llama_adapter_lora_init(self._model, os.fsencode(path)) for path, _ in adapters]
        if not all(loaded):
            raise RuntimeError("llama.cpp did not load an adapter")
        pointers = (_Pointer * len(loaded))(*loaded)
        scales = (ctypes.c_float * len(loaded))(*(scale for _, scale in adapters))
        if self._library.llama_set_adapters_lora(self._context, pointers, len(loaded), scales):
            raise RuntimeError("llama.cpp did not put the adapters on")

    def run(self, token_ids: list[int], position: int, asked: list[int]) -> memoryview:
        """Read tokens that stand at `position` and behind it; 0 begins a new sequence.

        Returns:
            float32 logits [len(asked), n_vocab] as bytes, in llama.cpp's memory until the next call.

        Raises:
            RuntimeError: llama.cpp refuses.
        """
        if position == 0:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = self._batch
        batch.n_tokens = len(token_ids)
        wanted = set(asked)
        for index, token_id in enumerate(token_ids):
            batch.token[index] = token_id
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index in wanted
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status} for {len(token_ids)} tokens at {position}")
        if not asked:
            return memoryview(b"")
        address = self._library.llama_get_logits(self._context)
        return memoryview((ctypes.c_uint8 * (4 * len(wanted) * self.n_vocab)).from_address(address)).cast("B")


def answer_requests(model: LogitsModel, requests: BinaryIO, replies: BinaryIO) -> None:
    """Serve until the requests end."""
    for line in requests:
        request = json.loads(line)
        try:
            logits = model.run(request["token_ids"], request["position"], request["asked"])
        except RuntimeError as exc:
            replies.write(json.dumps({"error": str(exc)}).encode() + b"\n")
        else:
            replies.write(b"{}\n")
            replies.write(logits)
        replies.flush()


class _Library:
    """llama.cpp's functions with their types."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._handle, name)
            function.restype, function.argtypes = result, list(arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
