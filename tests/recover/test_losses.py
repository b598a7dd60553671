"""The losses against their plain definitions, and against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lowbit_recover.distill.losses import Soft, divergence, hidden_loss, soft_of, token_loss

WORDS = 23


def logits(seed: int, positions: int = 5) -> Tensor:
    return 3 * torch.randn(positions, WORDS, generator=torch.Generator().manual_seed(seed))


def coarse(teacher: Tensor, ours: Tensor, words: Tensor, temperature: float) -> Tensor:
    """The obvious slow way: both distributions in full, everything that is not kept summed into one outcome."""
    found = []
    for p, q, kept in zip(
        (teacher / temperature).softmax(-1), (ours / temperature).softmax(-1), words, strict=True
    ):
        others = [word for word in range(WORDS) if word not in kept.tolist()]
        pairs = [(p[word], q[word]) for word in kept.tolist()] + [(p[others].sum(), q[others].sum())]
        found.append(sum(a * (a / b).log() for a, b in pairs))
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 4, WORDS - 1])
def test_the_divergence_of_kept_words_and_the_rest_is_that_of_the_two_coarse_distributions(
    k: int, temperature: float
) -> None:
    teacher, ours = logits(0).double(), logits(1).double()
    kept = soft_of(teacher, k, temperature)
    torch.testing.assert_close(
        divergence(ours, kept, temperature).float(),
        coarse(teacher, ours, kept.words, temperature).float(),
        rtol=1e-4,
        atol=1e-6,
    )


def test_with_all_words_it_is_the_whole_divergence_and_with_fewer_never_more() -> None:
    teacher, ours = logits(2), logits(3)
    whole = kl_div(ours.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(ours, soft_of(teacher, WORDS, 1.0), 1.0), whole)
    torch.testing.assert_close(divergence(ours, soft_of(teacher, 10 * WORDS, 1.0), 1.0), whole)
    for k in range(1, WORDS):
        assert bool((divergence(ours, soft_of(teacher, k, 1.0), 1.0) <= whole + 1e-5).all())


def test_mass_on_words_that_are_not_kept_costs_something() -> None:
    teacher = logits(4)
    kept = soft_of(teacher, 3, 1.0)
    others = torch.ones(WORDS, dtype=torch.bool)
    others[kept.words[0]] = False
    ours = teacher[:1].clone()
    ours[:, others] += 5  # the kept words keep their proportions, and lose nearly all mass to the others
    first = Soft(kept.words[:1], kept.log_probabilities[:1], kept.rest[:1])
    assert float(divergence(ours, first, 1.0)) > 0.5
    assert float(divergence(teacher[:1], first, 1.0)) == pytest.approx(0, abs=1e-6)


def test_a_teacher_that_leaves_nothing_for_other_words_gives_finite_gradients() -> None:
    teacher = torch.full((1, WORDS), -200.0)
    teacher[0, 7] = 200.0
    ours = logits(5, 1).requires_grad_()
    divergence(ours, soft_of(teacher, 2, 1.0), 1.0).sum().backward()
    assert ours.grad is not None
    assert bool(torch.isfinite(ours.grad).all())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_mixes_soft_and_hard_labels_and_its_gradients_are_finite_differences(alpha: float) -> None:
    temperature, targets = 2.0, torch.tensor([1, 5, 0, 22, 9])
    teacher = soft_of(logits(6).double(), 6, temperature)
    ours = logits(7).double().requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return token_loss(values, teacher, targets, temperature, alpha)

    soft = temperature**2 * divergence(ours, teacher, temperature)
    hard = cross_entropy(ours, targets, reduction="none")
    torch.testing.assert_close(loss(ours), (1 - alpha) * soft + alpha * hard)
    assert torch.autograd.gradcheck(loss, (ours,))


def test_the_error_of_hidden_states_is_a_share_of_their_own_size() -> None:
    aim = torch.tensor([[3.0, 4.0]])
    assert float(hidden_loss(aim, aim)) == 0
    assert float(hidden_loss(torch.zeros_like(aim), aim)) == pytest.approx(1)
    assert float(hidden_loss(2 * aim, aim)) == pytest.approx(float(hidden_loss(200 * aim, 100 * aim)))
