"""A GGUF file loaded for training, against transformers holding the same numbers dense."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sources import CONFIGS, VOCABULARY, dense_model, dequantized_reference, write_gguf_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ollama_forge.errors import ForgeError, GGUFError, UnsupportedError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import Field, TensorEntry, copy_entry, from_reader, write_gguf
from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.packed import PackedEmbedding, PackedLinear
from ollama_forge.train.recompute import recompute_activations

TYPES = [
    *(GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q5_K, GGMLType.Q5_0),
    *(GGMLType.Q5_1, GGMLType.Q4_K, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q3_K, GGMLType.Q2_K, GGMLType.IQ4_NL),
    *(GGMLType.IQ4_XS, GGMLType.IQ3_S, GGMLType.IQ2_XXS),
]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME_ROOM_BYTES = 1 << 20  # keeps some products and no block


def with_lora(model: PreTrainedModel, name: str, scale: float = 0.05) -> PeftModel:
    """The same adapter on every model of a family, seeded and in sorted order; `scale` 0 is peft's own start. A packed
    model gets our LoRA layers, as `finetune` has them."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, ALL_TARGETS), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, use_packed_lora(config))
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad and scale:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return adapted


def batch(length: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    return found


def require_same_training(path: Path, name: str, checkpointing: bool = False) -> None:
    reference, packed = dequantized_reference(name, path), load_packed(path).model
    inputs = batch()
    with torch.no_grad():
        expected = reference(inputs["input_ids"]).logits
        torch.testing.assert_close(packed(inputs["input_ids"]).logits, expected, rtol=1e-4, atol=1e-4)
    adapted = with_lora(reference, name), with_lora(packed, name)
    if checkpointing:
        adapted[1].train()
        recompute_activations(packed, SOME_ROOM_BYTES)
        adapted[1](**inputs).loss.backward()  # from the second pass on, some products are kept
        adapted[1].zero_grad()
    losses = [model(**inputs).loss for model in adapted]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) < 1e-5
    expected_gradients, found = gradients(adapted[0]), gradients(adapted[1])
    assert set(found) == set(expected_gradients)
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() < 1e-4 * gradient.norm(), key


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_lora_gradients_equal_the_dense_ones_for_every_type(tmp_path: Path, type: GGMLType) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", type)
    require_same_training(tmp_path / "m.gguf", "llama")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_lora_gradients_equal_the_dense_ones_for_every_family(tmp_path: Path, name: str) -> None:
    write_gguf_of(dense_model(name), name, tmp_path / "m.gguf", GGMLType.Q4_K)
    require_same_training(tmp_path / "m.gguf", name, checkpointing=name != "gpt2")


def test_every_head_grouping_and_every_bias_of_llama_is_put_in_order(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "num_key_value_heads": 4, "num_attention_heads": 8}
    write_gguf_of(dense_model("llama", **changes), "llama", tmp_path / "m.gguf", GGMLType.Q8_0, **changes)
    reference = dequantized_reference("llama", tmp_path / "m.gguf", **changes)
    packed = load_packed(tmp_path / "m.gguf").model
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_experts_of_a_mixture_can_be_adapted_one_by_one(tmp_path: Path) -> None:
    write_gguf_of(dense_model("qwen3_moe"), "qwen3_moe", tmp_path / "m.gguf", GGMLType.Q4_K)
    packed = load_packed(tmp_path / "m.gguf").model
    adapted = get_peft_model(packed, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert sum(".experts." in name for name in names) == 2 * 4 * 3 * 2
    adapted(**batch()).loss.backward()
    touched = [
        name for name, parameter in adapted.named_parameters() if parameter.grad is not None and parameter.grad.any()
    ]
    assert any(".experts.0.down_proj.lora_B" in name for name in touched)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_twenty_steps_of_adamw_follow_the_dense_loss_curve(tmp_path: Path, type: GGMLType) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", type)
    packed = load_packed(tmp_path / "m.gguf").model
    curves = []
    for model in (dequantized_reference("llama", tmp_path / "m.gguf"), packed):
        adapted = with_lora(model, "llama", scale=0).train()
        if model is packed:
            recompute_activations(packed, SOME_ROOM_BYTES)
        optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], lr=2e-3)
        curve = []
        for _ in range(20):
            loss = adapted(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3


def test_the_blocks_stay_in_the_file_and_only_small_tensors_are_parameters(tmp_path: Path) -> None:
    write_gguf_of(dense_model("llama3"), "llama3", tmp_path / "m.gguf", GGMLType.Q4_K)
    loaded = load_packed(tmp_path / "m.gguf")
    layers = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 2 * 7 + 1
    table = loaded.model.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert loaded.model.get_output_embeddings().matrix is table.matrix
    stored = np.frombuffer(loaded.file.read("token_embd.weight"), np.uint8)
    assert table.matrix.blocks.data_ptr() == stored.ctypes.data
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 5 * 256
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_the_adapter_that_peft_saves_fits_the_dense_model(tmp_path: Path) -> None:
    write_gguf_of(dense_model("qwen2"), "qwen2", tmp_path / "m.gguf", GGMLType.Q5_K)
    adapted = with_lora(load_packed(tmp_path / "m.gguf").model, "qwen2").eval()
    adapted.save_pretrained(tmp_path / "adapter")
    dense = PeftModel.from_pretrained(dequantized_reference("qwen2", tmp_path / "m.gguf"), tmp_path / "adapter").eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 1 << 20


def test_trl_trains_a_packed_model_and_its_loss_falls(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from ollama_forge.train.loss import ScoredOutput, install_chunked_loss

    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q4_K)
    words = Tokenizer(WordLevel({f"<{number}>": number for number in range(VOCABULARY)}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<2>")
    rows = [
        {"input_ids": [5 + number, 40, 50, 60 + number, 2], "labels": [-100, -100, 50, 60 + number, 2]}
        for number in range(8)
    ]
    curves = {}
    for kind in ("dense", "packed"):
        model = (
            load_packed(tmp_path / "m.gguf").model
            if kind == "packed"
            else dequantized_reference("llama", tmp_path / "m.gguf")
        )
        options = SFTConfig(
            output_dir=str(tmp_path / kind),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=5e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=0,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=with_lora(model, "llama", scale=0),
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        if kind == "packed":
            install_chunked_loss(trainer.model.get_base_model())
            output = trainer.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]))
            assert isinstance(output, ScoredOutput)
        trainer.train()
        curves[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(curves["packed"]) == 6
    assert curves["packed"][-1] < 0.7 * curves["packed"][0]
    assert max(abs(a - b) for a, b in zip(curves["dense"], curves["packed"], strict=True)) < 1e-3


def rewritten(
    path: Path, change: Callable[[list[Field], list[TensorEntry]], tuple[list[Field], list[TensorEntry]]]
) -> Path:
    """The file with other fields or tensors, beside it."""
    with open_gguf(path) as file:
        fields = [from_reader(entry) for entry in file.fields.values()]
        entries = [copy_entry(file, name) for name in file.tensors]
        fields, entries = change(fields, entries)
        with atomic_output(path.with_name("changed.gguf")) as sink:
            write_gguf(sink, fields, entries)
    return path.with_name("changed.gguf")


def extra(name: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, shape, GGMLType.F32, lambda: [np.zeros(shape, np.float32).tobytes()])


def test_tensors_of_pictures_are_left_out_and_named(tmp_path: Path) -> None:
    write_gguf_of(dense_model("gemma3"), "gemma3", tmp_path / "m.gguf", GGMLType.Q8_0)
    path = rewritten(
        tmp_path / "m.gguf", lambda fields, entries: (fields, [*entries, extra("v.blk.0.attn_q.weight", (4, 4))])
    )
    assert load_packed(path).skipped == ("v.blk.0.attn_q.weight",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: [entry for entry in entries if "ffn_up" not in entry.name], "lacks 2 tensors"),
        (lambda entries: [entry for entry in entries if "output_norm" not in entry.name], "model.norm.weight"),
        (lambda entries: [*entries, extra("blk.0.mystery.weight", (4,))], "blk.0.mystery.weight"),
        (lambda entries: [*entries, extra("blk.7.attn_norm.weight", (256,))], "blk.7.attn_norm.weight"),
        (
            lambda entries: [
                extra(entry.name, (3,)) if entry.name == "output_norm.weight" else entry for entry in entries
            ],
            "output_norm.weight",
        ),
        (
            lambda entries: [
                extra(entry.name, (64, 256)) if entry.name == "blk.0.attn_q.weight" else entry for entry in entries
            ],
            "blk.0.attn_q.weight",
        ),
        (lambda entries: [*entries, extra("blk.0.ffn_up.bias", (5,))], "blk.0.ffn_up.bias"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_the_tensor_s_name(
    tmp_path: Path, change: Callable[[list[TensorEntry]], list[TensorEntry]], words: str
) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q8_0)
    path = rewritten(tmp_path / "m.gguf", lambda fields, entries: (fields, change(entries)))
    with pytest.raises(GGUFError, match=words.replace(".", r"\.")):
        load_packed(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q8_0)

    def rename(fields: list[Field], entries: list[TensorEntry]) -> Any:
        renamed = [
            Field(entry.key, entry.type, "mamba") if entry.key == "general.architecture" else entry for entry in fields
        ]
        return renamed, entries

    with pytest.raises(UnsupportedError, match="mamba"):
        load_packed(rewritten(tmp_path / "m.gguf", rename))


def test_a_missing_hyper_parameter_is_an_error_of_ours(tmp_path: Path) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q8_0)
    path = rewritten(
        tmp_path / "m.gguf",
        lambda fields, entries: ([entry for entry in fields if entry.key != "llama.attention.head_count"], entries),
    )
    with pytest.raises(ForgeError, match="head_count"):
        load_packed(path)


MEMORY_CHILD = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from ollama_forge.train.load import load_packed

    def peak_mib():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.randn(64, 512), torch.randn(512, 512)).sum()
    before = peak_mib()
    model = load_packed(Path(sys.argv[1]), workspace_bytes=24 << 20).model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    ids = torch.randint(3, 60000, (1, 96))
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
    print(peak_mib() - before)
    """
)


@pytest.mark.slow
def test_training_a_hundred_million_parameters_never_holds_them_dense(tmp_path: Path) -> None:
    changes = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 64000,
        "tie_word_embeddings": True,
    }
    model = dense_model("llama", **changes)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters > 100_000_000
    write_gguf_of(model, "llama", tmp_path / "m.gguf", GGMLType.Q4_0, **changes)
    del model
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(tmp_path / "m.gguf")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    file_mib = (tmp_path / "m.gguf").stat().st_size / 2**20
    dense_mib = 4 * n_parameters / 2**20
    grown_mib = float(run.stdout)
    # the file, 24 MiB of workspace, the logits of one chunk (23 MiB), activations and peft's own code
    assert grown_mib < file_mib + 170 < dense_mib / 1.6
