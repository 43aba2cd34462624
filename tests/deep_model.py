"""A small model with many layers that has learnt the world of `learnt_model`: for judging what cutting layers costs.

`deep_model(tmp_path_factory)` trains it once in a test session (under a minute on one core) and gives its folder, as
Hugging Face has it; all workers of a parallel run share it. It predicts conversations well; it need not answer all of
them right. It is trained with stochastic depth (https://arxiv.org/abs/1603.09382): the layers `SELDOM` are skipped most
of the time, so that it is known which layers it can do without.
"""

from __future__ import annotations

import fcntl
import importlib.util
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from learnt_model import MODEL_DIR

N_LAYERS = 10
SELDOM = (3, 5, 6, 8)
SKIPPED_SHARE = 0.7
STEPS = 110
ROWS = 8
PEAK_RATE = 4e-3


def deep_model(factory: pytest.TempPathFactory) -> Path:
    """The trained folder."""
    root = factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of a parallel run
        root = root.parent
    folder = root / "deep-model"
    with (root / "deep-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _train(folder)
    return folder


def conversations(seed: int, count: int) -> list[list[int]]:
    """Rows of token ids as the model saw in training, drawn anew; each is one whole conversation."""
    maker, tokenizer = _maker(), _tokenizer()
    draw = random.Random(f"held out {seed}")
    world = maker.world
    return [[token for token, _ in maker.encode(tokenizer, world.training_conversation(draw))] for _ in range(count)]


def _maker() -> ModuleType:
    """scripts/make_demo_model.py, which knows how the world becomes rows."""
    name = "make_demo_model"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def _train(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    maker, tokenizer = _maker(), _tokenizer()
    training = maker.Training(steps=STEPS, rows_per_step=ROWS, peak_rate=PEAK_RATE, prompt_weight=0.3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    draw = random.Random("deep")
    config = LlamaConfig(
        vocab_size=maker.VOCABULARY_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    every = list(model.model.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = maker.rate_at(step, training)
        present = [layer for n, layer in enumerate(every) if n not in SELDOM or draw.random() > SKIPPED_SHARE]
        model.model.layers = torch.nn.ModuleList(present)
        ids, weights = maker.draw_batch(tokenizer, draw, training)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.model.layers = torch.nn.ModuleList(every)
    torch.set_num_threads(threads)
    unfinished = folder.with_name(folder.name + "-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(MODEL_DIR / name, unfinished / name)
    unfinished.rename(folder)
