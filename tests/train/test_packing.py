"""Examples that share a row learn what they would learn alone, in every family."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sources import CONFIGS, VOCABULARY, dense_model, write_gguf_of
from peft import PeftModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ollama_forge.dataset.examples import Source
from ollama_forge.dataset.pack import pack_rows
from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.finetune import add_adapter, as_dataset
from ollama_forge.train.load import load_packed
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.options import LoraOptions

LENGTHS = (21, 3, 12, 1, 16)  # beyond the sliding window of 8, and one that has nothing to predict


def rows_of(seed: int) -> list[Tokenized]:
    """Rows whose first labels are learnt too, so that a neighbour's last token could be asked for them."""
    draw = random.Random(seed)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        labels = [token if draw.random() < 0.7 or place == 0 else -100 for place, token in enumerate(ids)]
        rows.append(Tokenized(array("q", ids), array("q", labels), Source(Path("data.jsonl"), number + 1)))
    return rows


def trained_model(name: str, path: Path) -> PeftModel:
    write_gguf_of(dense_model(name), name, path, GGMLType.F32)
    packed = load_packed(path)
    adapted = add_adapter(packed.model, LoraOptions(rank=4))
    install_chunked_loss(packed.model)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return adapted.eval()


def batch_of(rows: list[Tokenized]) -> dict[str, Any]:
    packs = pack_rows(rows, sum(LENGTHS))
    assert len(packs) == 1
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return dict(collate(list(as_dataset(packs))))


def slopes(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_loss_and_gradients_of_a_packed_row_are_those_of_its_examples_alone(name: str, tmp_path: Path) -> None:
    model = trained_model(name, tmp_path / "m.gguf")
    rows = rows_of(1)
    total = torch.zeros(())
    n_learnt = 0
    for row in rows:
        labels = torch.tensor([list(row.labels)])
        count = int((labels[:, 1:] != -100).sum())
        if count:
            total = total + count * model(input_ids=torch.tensor([list(row.input_ids)]), labels=labels).loss
            n_learnt += count
    (total / n_learnt).backward()
    expected = slopes(model)
    output = model(**batch_of(rows))
    output.loss.backward()
    assert int(output.label_mask.sum()) == n_learnt
    assert abs(float(output.loss) - float(total / n_learnt)) < 1e-5
    found = slopes(model)
    assert found.keys() == expected.keys() and expected
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_example_of_a_row_sees_another(name: str, tmp_path: Path) -> None:
    model = trained_model(name, tmp_path / "m.gguf")
    rows = rows_of(1)
    others = [rows_of(2)[0], *rows[1:]]
    first = LENGTHS[0]
    with torch.no_grad():
        one, two = (model(**batch_of(some)).log_probs[0] for some in (rows, others))
    assert torch.equal(one[first:], two[first:])
    assert not torch.allclose(one[: first - 1], two[: first - 1])
