"""Parts of a distillation on small packed models: teachers, the cache of their predictions, batches, full training."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch
from packed_sources import VOCABULARY, dense_model, dequantized_reference, write_gguf_of

from ollama_forge.dataset.examples import Source
from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.errors import TrainingError, UnsupportedError, UsageError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.distill import StudentRows, install_distill_loss, judge
from ollama_forge.train.distill_batches import IGNORED, answer_itself, batch_items, collate
from ollama_forge.train.distill_loss import distill_scores
from ollama_forge.train.distill_options import DistillLoss, DistillOptions, Divergence, OnPolicy
from ollama_forge.train.full import plan_write_back, unpack_weights, write_back
from ollama_forge.train.load import load_packed
from ollama_forge.train.loss import Head
from ollama_forge.train.teacher import most_probable, packed_teacher, wanted_positions
from ollama_forge.train.teacher_cache import CacheFacts, build_cache, hash_rows, pack_ids, unpack_ids

FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "gpt2", "qwen3_moe")
SOURCE = Source("test", 1)


def rows(n: int = 5, seed: int = 0) -> list[Tokenized]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(n):
        ids = torch.randint(3, VOCABULARY, (7 + number % 9,), generator=draw).tolist()
        made.append(Tokenized(array("i", ids), array("i", [IGNORED] * 3 + ids[3:]), SOURCE))
    return made


def facts(data: list[Tokenized], n_kept: int = VOCABULARY, temperature: float = 1.0) -> CacheFacts:
    return CacheFacts("t", hash_rows(data), len(data), n_kept, VOCABULARY, temperature)


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher.gguf"
    write_gguf_of(dense_model("llama", seed=1), "llama", path, GGMLType.Q8_0)
    return path


@pytest.fixture(scope="module")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "student.gguf"
    write_gguf_of(dense_model("llama", seed=2), "llama", path, GGMLType.F16)
    return path


def test_a_batch_scores_the_labelled_positions_and_padding_changes_nothing(
    teacher_path: Path, student_path: Path
) -> None:
    teacher, student = packed_teacher(load_packed(teacher_path)), load_packed(student_path).model
    install_distill_loss(student, DistillLoss())
    data = rows(3)
    together = collate(batch_items(data))
    count = int(wanted_positions(together).sum())
    whole = student(**_seen(together), teacher_targets=teacher.targets(together)).divergence * count
    alone = 0.0
    for item in batch_items(data):
        batch = collate([item])
        n = int(wanted_positions(batch).sum())
        alone += float(student(**_seen(batch), teacher_targets=teacher.targets(batch)).divergence) * n
    assert float(whole) == pytest.approx(alone, rel=1e-4)
    assert count == sum(len(row.input_ids) - 3 for row in data)


def _seen(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def test_a_model_that_is_its_own_teacher_is_at_distance_zero(teacher_path: Path) -> None:
    student = load_packed(teacher_path).model
    install_distill_loss(student, DistillLoss(Divergence.JSD))
    found = judge(student, packed_teacher(load_packed(teacher_path)), list(enumerate(rows())))
    assert abs(found.divergence) < 1e-5 and found.cross_entropy > 1


def test_the_cache_gives_back_what_was_kept(teacher_path: Path, tmp_path: Path) -> None:
    data = rows(5)
    kept = facts(data, 12)
    teacher = packed_teacher(load_packed(teacher_path))
    cached = build_cache(lambda: teacher, data, kept, tmp_path)
    items = batch_items(data)
    batch = collate([items[3], items[1]])
    expected = most_probable(teacher.targets(batch), 12, VOCABULARY, 1.0)
    found = cached.targets(batch)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs.exp(), expected.log_probs.exp(), rtol=2e-3, atol=1e-6)
    size = sum(path.stat().st_size for path in cached.folder.glob("*.safetensors"))
    n_positions = sum(len(row.input_ids) - 3 for row in data)
    assert kept.position_bytes * n_positions <= size <= kept.position_bytes * n_positions + 1000


def test_words_of_a_large_vocabulary_take_three_bytes() -> None:
    ids = torch.tensor([[0, 65_535, 65_536, 151_935]]).numpy()
    packed = pack_ids(ids, 151_936)
    assert packed.nbytes == 12 and (unpack_ids(packed) == ids).all()
    assert CacheFacts("t", "r", 1, 48, 151_936, 1.0).position_bytes == 242
    assert CacheFacts("t", "r", 1, 48, 32_000, 1.0).position_bytes == 194


def test_a_teacher_is_asked_once_and_a_killed_build_goes_on(teacher_path: Path, tmp_path: Path) -> None:
    data = rows(130)
    asked = []

    def teacher() -> object:
        return packed_teacher(load_packed(teacher_path))

    build_cache(teacher, data, facts(data, 4), tmp_path, advance=asked.append)  # type: ignore[arg-type]
    files = sorted((tmp_path / facts(data, 4).folder_name).glob("rows-*"))
    before = [path.read_bytes() for path in files]
    assert len(files) == 3 and len(asked) == 130
    files[1].unlink()
    build_cache(teacher, data, facts(data, 4), tmp_path, advance=asked.append)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in files] == before and len(asked) == 130 + 64

    def nobody() -> object:
        raise AssertionError("everything is on disk")

    build_cache(nobody, data, facts(data, 4), tmp_path)  # type: ignore[arg-type]
    assert facts(data, 5).folder_name != facts(data, 4).folder_name != facts(data, 4, 2.0).folder_name


@pytest.mark.parametrize("divergence", [Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.JSD])
def test_the_gradient_from_kept_words_is_within_the_stated_bound(
    teacher_path: Path, tmp_path: Path, divergence: Divergence
) -> None:
    """In the logits, as a sum of absolute values: 2 x the mass that was not kept, and the rounding of 16-bit logs."""
    teacher = packed_teacher(load_packed(teacher_path))
    data = rows(4)
    batch = collate(batch_items(data))
    labels = batch["labels"][:, 1:][wanted_positions(batch)]
    whole = teacher.targets(batch)
    scores = torch.randn(len(labels), VOCABULARY, generator=torch.Generator().manual_seed(5), requires_grad=True)
    identity = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False).requires_grad_(False)
    identity.weight.copy_(torch.eye(VOCABULARY))
    for n_kept in (4, 40, VOCABULARY):
        cached = build_cache(lambda: teacher, data, facts(data, n_kept), tmp_path).targets(batch)
        gradients = [
            torch.autograd.grad(
                distill_scores(scores, labels, each, Head(identity), DistillLoss(divergence)).loss, scores
            )[0]
            for each in (whole, cached)
        ]
        difference = (gradients[0] - gradients[1]).abs().sum(-1)
        rest = cached.log_probs[:, -1].exp()
        entropy = -(cached.log_probs.exp() * cached.log_probs).sum(-1)
        if divergence is Divergence.FORWARD_KL:
            assert (difference <= 2 * rest + 2 * 2**-11 * entropy + 1e-5).all()
        elif n_kept == VOCABULARY:
            assert (difference < 0.02).all()


def test_a_cache_of_other_rows_or_files_is_refused(teacher_path: Path, tmp_path: Path) -> None:
    data = rows(2)
    cached = build_cache(lambda: packed_teacher(load_packed(teacher_path)), data, facts(data), tmp_path)
    with pytest.raises(TrainingError, match="Row -1"):
        cached.targets(collate([{"input_ids": [5, 6], "labels": [5, 6], "row": -1}]))
    with pytest.raises(UsageError, match="--cache"):
        DistillOptions(on_policy=OnPolicy(0.5), cached_words=8)


def test_own_answers_follow_the_seed_and_end_at_an_end_token(student_path: Path) -> None:
    student = load_packed(student_path).model
    batch = collate(batch_items(rows(3)))
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ends = list(range(3, 40))
        said.append(answer_itself(student, batch, ends, max_tokens=12, temperature=1.0))
    assert torch.equal(said[0]["input_ids"], said[1]["input_ids"])
    assert not torch.equal(said[0]["input_ids"], said[2]["input_ids"])
    for ids, labels, prompt in zip(said[0]["input_ids"], said[0]["labels"], batch["input_ids"], strict=True):
        assert torch.equal(ids[:3], prompt[:3]) and (labels[:3] == IGNORED).all()
        answer = labels[labels != IGNORED].tolist()
        assert answer and all(token not in ends for token in answer[:-1])
        assert answer[-1] in ends or len(answer) == 12


def test_a_padded_prompt_is_answered_as_it_would_be_alone(student_path: Path) -> None:
    student = load_packed(student_path).model
    made = [Tokenized(row.input_ids, array("i", [IGNORED] * (2 + n) + list(row.labels[2 + n :])), SOURCE)
            for n, row in enumerate(rows(2))]  # fmt: skip
    together = answer_itself(student, collate(batch_items(made)), (), max_tokens=5, temperature=1e-4)
    for number, row in enumerate(made):
        alone = answer_itself(student, collate(batch_items([row])), (), max_tokens=5, temperature=1e-4)
        length = alone["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][number, :length], alone["input_ids"][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_unpacked_weights_are_the_files_and_go_back_as_they_were(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(name), name, path, GGMLType.F16)
    packed = load_packed(path)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = packed.model(ids).logits
    unpack_weights(packed)
    assert all(p.requires_grad and not p.is_meta for p in packed.model.parameters())
    torch.testing.assert_close(packed.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    is_tied = packed.model.config.tie_word_embeddings
    head, table = packed.model.get_output_embeddings(), packed.model.get_input_embeddings()
    assert (head.weight is table.weight) == is_tied
    write_back(packed, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_what_was_learnt_is_what_the_written_file_computes(name: str, tmp_path: Path) -> None:
    write_gguf_of(dense_model(name), name, tmp_path / "model.gguf", GGMLType.F32)
    packed = load_packed(tmp_path / "model.gguf")
    unpack_weights(packed)
    with torch.no_grad():
        for seed, parameter in enumerate(packed.model.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    write_back(packed, tmp_path / "learnt.gguf")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    again = dequantized_reference(name, tmp_path / "learnt.gguf")
    torch.testing.assert_close(again(ids).logits, packed.model(ids).logits, rtol=1e-3, atol=1e-3)


def test_full_training_of_a_type_that_cannot_be_written_again_is_refused_before_it(tmp_path: Path) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.IQ2_XXS)
    with open_gguf(tmp_path / "m.gguf") as gguf, pytest.raises(UnsupportedError, match="importance matrix"):
        plan_write_back(load_packed(gguf))


def test_rows_are_numbered_through_training_and_validation() -> None:
    data = rows(5)
    assert [item["row"] for item in batch_items(StudentRows(data[:3], data[3:]).all)] == [0, 1, 2, 3, 4]
