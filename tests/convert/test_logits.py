"""A converted model says what transformers says: the same greedy tokens, with the same probabilities."""

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import KINDS, build_model, spell_as_transformers_4

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.files import atomic_output
from ollama_forge.gguf.writer import write_gguf

N_GENERATED = 6
SHORT = (3, 11, 24, 40)
LONGER_THAN_THE_WINDOW = 90  # the tiny Gemmas slide over 64 tokens


def convert(folder: Path, out: Path) -> int:
    with plan_conversion(folder, ConvertOptions(outtype="f32")) as conversion:
        with atomic_output(out) as sink:
            write_gguf(sink, conversion.fields, conversion.entries)
        return len(conversion.vocabulary.tokens)


def random_prompts(n_vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    source = random.Random(7)
    return [[source.randrange(20, n_vocab - 20) for _ in range(length)] for length in lengths]


def reference_logprobs(folder: Path, texts: list[list[int]]) -> list[Any]:
    """log P(next token) after every token of every text: float64 [tokens, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([text])).logits[0].double(), dim=-1) for text in texts]


def assert_agreement(
    folder: Path, gguf_path: Path, prompts: list[list[int]], context_length: int, n_vocab: int
) -> None:
    one = Sampling(max_tokens=1, temperature=0.0, seed=0)
    several = Sampling(max_tokens=N_GENERATED, temperature=0.0, seed=0)
    with open_engine(gguf_path, context_length=context_length, n_threads=1) as engine:
        first = [engine.generate(prompt, one, n_logprobs=n_vocab) for prompt in prompts]
        answer = engine.generate(prompts[-1], several)
    *expected, continued = reference_logprobs(folder, [*prompts, prompts[-1] + list(answer.token_ids)])
    for number, token_id in enumerate(answer.token_ids):
        assert int(continued[len(prompts[-1]) - 1 + number].argmax()) == token_id
    differences = []
    for generation, rows in zip(first, expected, strict=True):
        assert generation.token_ids == (int(rows[-1].argmax()),)
        for said in generation.logprobs:  # none where the token is a part of a character
            differences += [abs(logprob - float(rows[-1][token_id])) for token_id, logprob in said.top.items()]
    assert len(differences) > 2 * n_vocab
    assert max(differences) < 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gemma3_vision", "gemma3_json")])
def test_engine_on_the_gguf_agrees_with_transformers_on_the_folder(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model(kind, folder)
    n_vocab = convert(folder, tmp_path / "model.gguf")
    prompts = random_prompts(n_vocab, (*SHORT, LONGER_THAN_THE_WINDOW))
    assert_agreement(folder, tmp_path / "model.gguf", prompts, 256, n_vocab)


def test_long_contexts_use_the_long_factors(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model("phi3_long", folder)
    n_vocab = convert(folder, tmp_path / "model.gguf")
    prompts = random_prompts(n_vocab, (600, 620, 640, 660))
    assert_agreement(folder, tmp_path / "model.gguf", prompts, 1024, n_vocab)


def test_a_configuration_of_transformers_4_means_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model("gemma3", folder)
    spell_as_transformers_4(folder)
    n_vocab = convert(folder, tmp_path / "model.gguf")
    prompts = random_prompts(n_vocab, (*SHORT, LONGER_THAN_THE_WINDOW))
    assert_agreement(folder, tmp_path / "model.gguf", prompts, 256, n_vocab)
