"""Training the learnt model packed follows dense float32 training of the same weights, step by step, in every type."""

from pathlib import Path

import pytest
import torch
from command import DEMO_MODEL, forge_json
from learnt_model import DEMO_DIR
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.prompt_windows import prompt_windows
from ollama_forge.dataset.windows import NOT_SCORED, Window
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.train.load import load_packed

WITH_IMATRIX = (
    "Q2_K_S",
    "IQ3_M",
    "IQ3_S",
    "IQ3_XS",
    "IQ3_XXS",
    "IQ2_M",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
)
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS", *WITH_IMATRIX),
)
N_STEPS = 20
BATCH_SIZE = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The learnt model in float32, and an importance matrix beside it."""
    folder = tmp_path_factory.mktemp("source")
    forge_json("convert", DEMO_MODEL, "-o", folder / "f32.gguf", "--outtype", "f32")
    forge_json("imatrix", folder / "f32.gguf", "-o", folder / "imatrix.gguf")
    return folder / "f32.gguf"


def batches(windows: tuple[Window, ...]) -> list[dict[str, torch.Tensor]]:
    """Twenty batches of rendered conversations; only answers are learnt."""
    found = []
    for step in range(N_STEPS):
        rows = [windows[(step * BATCH_SIZE + row) % len(windows)] for row in range(BATCH_SIZE)]
        ids = [torch.tensor(row.input_ids) for row in rows]
        labels = [torch.tensor(row.labels) for row in rows]
        found.append(
            {
                "input_ids": pad_sequence(ids, batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_SCORED),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            }
        )
    return found


def curve(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> list[float]:
    torch.manual_seed(11)
    adapted: PeftModel = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], lr=1e-3)
    losses = []
    for inputs in data:
        loss = adapted(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quant", TYPES)
def test_the_loss_curve_is_that_of_dense_training(quant: str, source: Path, tmp_path: Path) -> None:
    path = source
    if quant != "F32":
        path = tmp_path / "packed.gguf"
        imatrix = ("--imatrix", source.with_name("imatrix.gguf")) if quant in WITH_IMATRIX else ()
        forge_json("quantize", source, "-o", path, "--type", quant, *imatrix)
    forge_json("export", path, "--format", "hf", "--dtype", "f32", "-o", tmp_path / "dense")
    with open_gguf(path) as file:
        data = batches(prompt_windows(DEMO_DIR / "finetune.jsonl", chat_format_of(file.metadata), 64).windows)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected, found = curve(dense, data), curve(load_packed(path).model, data)
    assert expected[-1] < 0.8 * expected[0]
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-3
