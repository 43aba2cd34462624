"""One training run on one open GGUF: load packed, train, close.

In: what `jobs.finetune` has prepared and checked. Out: `TrainedAdapter`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.gguf.imatrix import write_imatrix
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.tokenizer.encode import GGUFTokenizer
from ollama_forge.train.finetune import train_adapter
from ollama_forge.train.importance import gather_importance
from ollama_forge.train.load import load_packed
from ollama_forge.train.options import IMPORTANCE_FILE, LoopOptions, LoraOptions, TrainedAdapter, Watch

SMALL_MODEL_BYTES = 16 << 20
IMPORTANCE_ROWS = 256


def run_training(
    gguf: GGUFFile,
    tokenizer: GGUFTokenizer,
    train: Sequence[Tokenized],
    validation: Sequence[Tokenized],
    lora: LoraOptions,
    loop: LoopOptions,
    folder: Path,
    *,
    base: str,
    resume: bool = False,
    is_shared: bool = False,
    watch: Watch | None = None,
) -> TrainedAdapter:
    """Train LoRA matrices on the packed blocks of a GGUF; see `finetune.train_adapter`.

    Beside the adapter an importance matrix is left (`IMPORTANCE_FILE`), for a merge into the same quantization.
    """
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if gguf.size_bytes < SMALL_MODEL_BYTES:
            # Threads that wait for each other cost more than they bring where a model fits the processor's cache.
            torch.set_num_threads(1)
        packed = load_packed(gguf)
        adapted, trained = train_adapter(
            packed.model,
            wrap_tokenizer(tokenizer),
            train,
            validation,
            lora,
            loop,
            folder,
            base=base,
            resume=resume,
            is_shared=is_shared,
            watch=watch,
        )
        if PartialState().is_main_process:
            imatrix = gather_importance(packed, adapted, islice(train, IMPORTANCE_ROWS))
            write_imatrix(folder / IMPORTANCE_FILE, imatrix, overwrite=True)
    return trained


def wrap_tokenizer(tokenizer: GGUFTokenizer) -> PreTrainedTokenizerFast:
    """What TRL asks a tokenizer for: an end token, and a padding token, which is masked anyway."""
    eos_id = tokenizer.eos_id if tokenizer.eos_id is not None else 0
    eos = tokenizer.tokens[eos_id]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer, eos_token=eos, pad_token=eos)
