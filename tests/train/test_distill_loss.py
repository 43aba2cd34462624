"""Each divergence and its gradient against the same formula over whole float64 logits, differentiated by torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ollama_forge.train.loss as loss_module
from ollama_forge.errors import TrainingError, UsageError
from ollama_forge.gguf.native import quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.blocks import PackedMatrix, Workspace
from ollama_forge.train.distill_loss import DenseTargets, SparseTargets, distill_scores
from ollama_forge.train.distill_options import DistillLoss, Divergence, OnPolicy
from ollama_forge.train.loss import Head
from ollama_forge.train.packed import PackedLinear
from ollama_forge.train.teacher import most_probable

WIDTH, TEACHER_WIDTH, WORDS, N = 64, 96, 300, 17
LOSSES = [
    DistillLoss(Divergence.FORWARD_KL),
    DistillLoss(Divergence.REVERSE_KL),
    DistillLoss(Divergence.JSD, beta=0.5),
    DistillLoss(Divergence.JSD, beta=0.1, temperature=3.0),
    DistillLoss(Divergence.SORTED),
    DistillLoss(Divergence.FORWARD_KL, temperature=2.0, ce_weight=0.3),
    DistillLoss(Divergence.REVERSE_KL, temperature=0.7, ce_weight=1.0),
]


def loss_name(loss: DistillLoss) -> str:
    return f"{loss.divergence.value} b{loss.beta} t{loss.temperature} ce{loss.ce_weight}"


@pytest.fixture(params=[1 << 30, 8 * WORDS * 5, 1], ids=["one chunk", "5 positions", "1 position"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", request.param)


def linear(words: int, width: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, words, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(words, width, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return layer


def hidden_states(width: int, seed: int) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def labels() -> torch.Tensor:
    return torch.randint(WORDS, (N,), generator=torch.Generator().manual_seed(3))


def reference(
    student: torch.Tensor, teacher: torch.Tensor, wanted: torch.Tensor, loss: DistillLoss
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, divergence, cross-entropy) of whole float64 logits, summed; written from the definitions."""
    cross_entropy = nn.functional.cross_entropy(student, wanted, reduction="sum")
    q, p = (torch.softmax(logits / loss.temperature, -1) for logits in (student, teacher))
    if loss.divergence is Divergence.FORWARD_KL:
        divergence = (p * (p / q).log()).sum()
    elif loss.divergence is Divergence.REVERSE_KL:
        divergence = (q * (q / p).log()).sum()
    elif loss.divergence is Divergence.JSD:
        m = loss.beta * p + (1 - loss.beta) * q
        divergence = loss.beta * (p * (p / m).log()).sum() + (1 - loss.beta) * (q * (q / m).log()).sum()
    else:
        longest = max(p.shape[1], q.shape[1])
        ordered = [nn.functional.pad(x.sort(-1, descending=True).values, (0, longest - x.shape[1])) for x in (p, q)]
        divergence = (ordered[0] - ordered[1]).abs().sum() / 2
    mixed = loss.ce_weight * cross_entropy + (1 - loss.ce_weight) * loss.temperature**2 * divergence
    return mixed, divergence, cross_entropy


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize("loss", LOSSES, ids=loss_name)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_loss_and_gradients_equal_a_plain_float64_reference(chunk: None, loss: DistillLoss, softcap: float) -> None:
    student, teacher = linear(WORDS, WIDTH, 1), linear(WORDS, TEACHER_WIDTH, 2)
    student.weight.requires_grad_(True)
    hidden, seen = hidden_states(WIDTH, 4).requires_grad_(True), hidden_states(TEACHER_WIDTH, 5)
    wide, weight = hidden.detach().double().requires_grad_(True), student.weight.detach().double().requires_grad_(True)
    expected = reference(
        capped(wide @ weight.t(), softcap), capped(seen.double() @ teacher.weight.double().t(), softcap), labels(), loss
    )
    expected[0].backward()
    found = distill_scores(hidden, labels(), DenseTargets(seen, Head(teacher, softcap)), Head(student, softcap), loss)
    found.loss.backward()
    for value, wanted in zip((found.loss, found.divergence, found.cross_entropy), expected, strict=True):
        assert value.item() == pytest.approx(wanted.item(), rel=2e-5, abs=1e-5)
    assert hidden.grad is not None and student.weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES[:5], ids=loss_name)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(loss: DistillLoss) -> None:
    head = linear(WORDS, WIDTH, 1)
    hidden = hidden_states(WIDTH, 4).requires_grad_(True)
    found = distill_scores(hidden, labels(), DenseTargets(hidden.detach(), Head(head)), Head(head), loss)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-5 * N
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("loss", LOSSES[:4], ids=loss_name)
def test_all_words_kept_are_the_whole_distribution(loss: DistillLoss) -> None:
    student, teacher = linear(WORDS, WIDTH, 1), linear(WORDS, TEACHER_WIDTH, 2)
    hidden = hidden_states(WIDTH, 4).requires_grad_(True)
    targets = DenseTargets(hidden_states(TEACHER_WIDTH, 5), Head(teacher))
    kept = most_probable(targets, WORDS, WORDS, loss.temperature)
    losses = [distill_scores(hidden, labels(), each, Head(student), loss).loss for each in (targets, kept)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(each, hidden)[0] for each in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES[:4], ids=loss_name)
def test_kept_words_give_a_lower_bound_with_its_own_true_gradient(loss: DistillLoss) -> None:
    student = linear(WORDS, WIDTH, 1)
    targets = DenseTargets(hidden_states(TEACHER_WIDTH, 5), Head(linear(WORDS, TEACHER_WIDTH, 2)))
    kept = most_probable(targets, 20, WORDS, loss.temperature)
    hidden = hidden_states(WIDTH, 4).requires_grad_(True)
    found = distill_scores(hidden, labels(), kept, Head(student), loss)
    whole = distill_scores(hidden, labels(), targets, Head(student), loss)
    assert 0 < found.divergence.item() < whole.divergence.item()
    wide = hidden.detach().double().requires_grad_(True)
    q = torch.softmax(wide @ student.weight.double().t() / loss.temperature, -1)
    chosen = q.gather(-1, kept.ids)
    joined = torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
    expected = reference(joined.log() * loss.temperature, kept.log_probs.double() * loss.temperature,
                         torch.zeros(N, dtype=torch.int64), loss)[1] * loss.temperature**2  # fmt: skip
    expected.backward()
    (gradient,) = torch.autograd.grad(found.loss, hidden)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-3, atol=1e-5)


def test_a_packed_head_is_read_as_its_dense_copy_is() -> None:
    weight = torch.randn(WORDS, 256, generator=torch.Generator().manual_seed(0)) * 0.2
    blocks = torch.from_numpy(quantize(weight.numpy(), GGMLType.Q6_K))
    packed = PackedLinear(PackedMatrix(blocks, GGMLType.Q6_K, 256), None, Workspace(1 << 16))
    dense = nn.Linear(256, WORDS, bias=False).requires_grad_(False)
    dense.weight.copy_(packed.matrix.dequantized())
    hidden = torch.randn(N, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = DenseTargets(hidden_states(TEACHER_WIDTH, 5), Head(linear(WORDS, TEACHER_WIDTH, 2)))
    losses = [distill_scores(hidden, labels(), targets, Head(head), LOSSES[0]).loss for head in (packed, dense)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden)[0] for each in losses))


def test_padding_words_of_the_longer_vocabulary_are_left_out_of_both() -> None:
    student, teacher = linear(WORDS + 20, WIDTH, 1), linear(WORDS, TEACHER_WIDTH, 2)
    cut = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)
    cut.weight.copy_(student.weight[:WORDS])
    hidden = hidden_states(WIDTH, 4).requires_grad_(True)
    targets = DenseTargets(hidden_states(TEACHER_WIDTH, 5), Head(teacher))
    losses = [distill_scores(hidden, labels(), targets, Head(head), LOSSES[5]).loss for head in (student, cut)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden)[0] for each in losses))


def test_certain_and_opposite_predictions_give_finite_numbers() -> None:
    head = nn.Linear(8, 8, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(8) * 500)
    hidden = torch.eye(8).requires_grad_(True)
    targets = DenseTargets(torch.eye(8).flip(0), Head(head))
    for loss in LOSSES:
        for each in (targets, most_probable(targets, 2, 8, loss.temperature)):
            if isinstance(each, SparseTargets) and loss.divergence is Divergence.SORTED:
                continue
            found = distill_scores(hidden, torch.arange(8), each, Head(head), loss)
            (gradient,) = torch.autograd.grad(found.loss, hidden)
            assert math.isfinite(found.loss.item()) and gradient.isfinite().all(), loss


def test_the_students_precision_may_be_bfloat16() -> None:
    head, teacher = linear(WORDS, WIDTH, 1), linear(WORDS, TEACHER_WIDTH, 2)
    hidden = hidden_states(WIDTH, 4).bfloat16().requires_grad_(True)
    targets = DenseTargets(hidden_states(TEACHER_WIDTH, 5), Head(teacher))
    found = distill_scores(hidden, labels(), targets, Head(head), LOSSES[0])
    exact = distill_scores(hidden.detach().float(), labels(), targets, Head(head), LOSSES[0])
    found.loss.backward()
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_rows_that_do_not_belong_together_are_refused() -> None:
    head = linear(WORDS, WIDTH, 1)
    targets = DenseTargets(hidden_states(WIDTH, 5)[:3], Head(head))
    with pytest.raises(TrainingError, match="3 rows of the teacher for 17"):
        distill_scores(hidden_states(WIDTH, 4), labels(), targets, Head(head), LOSSES[0])
    whole = DenseTargets(hidden_states(WIDTH, 5), Head(head))
    with pytest.raises(TrainingError, match=str(WORDS)):
        distill_scores(hidden_states(WIDTH, 4), labels() + WORDS, whole, Head(head), LOSSES[0])


@pytest.mark.parametrize(
    "settings",
    [{"ce_weight": 1.1}, {"temperature": 0.0}, {"divergence": Divergence.JSD, "beta": 1.0}],
)
def test_numbers_that_make_no_loss_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        DistillLoss(**settings)  # type: ignore[arg-type]


def test_a_share_of_own_answers_above_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1\.5"):
        OnPolicy(1.5)
