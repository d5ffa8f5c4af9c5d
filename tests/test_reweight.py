"""Weighted losses: the maths of TALR and FLOW against loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from daa_ext.reweight import (
    flow_weights,
    median,
    sequence_means,
    talr_weights,
    token_losses,
    weighted_mean,
)

NONE = -100
LABELS = torch.tensor([[NONE, 3, 1, 0], [NONE, NONE, 2, NONE], [4, NONE, NONE, NONE]])


def logits(seed: int = 0, words: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*LABELS.shape, words, generator=generator, dtype=torch.float64) * 3


def loop(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """Losses of the labelled tokens, by sequence: the label at t + 1 is predicted at t."""
    found: list[list[float]] = []
    for row, sequence in zip(logits.tolist(), labels.tolist(), strict=True):
        losses = []
        for scores, label in zip(row[:-1], sequence[1:], strict=True):
            if label != NONE:
                total = math.log(sum(math.exp(score) for score in scores))
                losses.append(total - scores[label])
        found.append(losses)
    return found


def test_token_losses_are_those_of_the_next_label() -> None:
    losses, labelled = token_losses(logits(), LABELS)
    expected = loop(logits(), LABELS)
    assert [row[mask].tolist() for row, mask in zip(losses, labelled, strict=True)] == [
        pytest.approx(row, rel=1e-6, abs=1e-6) for row in expected
    ]
    assert losses.dtype == torch.float32
    assert not losses[~labelled].any()
    assert labelled.sum(1).tolist() == [3, 1, 0]  # the third has its only label where none asks


def test_sequence_means_are_nan_without_labels() -> None:
    means = sequence_means(*token_losses(logits(), LABELS))
    expected = [sum(row) / len(row) for row in loop(logits(), LABELS)[:2]]
    assert means[:2].tolist() == pytest.approx(expected, rel=1e-6)
    assert means[2].isnan()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        ([3.0, 1.0], 2.0),
        ([5.0, 1.0, 2.0], 2.0),
        ([9.0, 1.0, 2.0, 4.0], 3.0),
        ([math.nan, 4.0, math.nan, 1.0, 2.0], 2.0),
        ([math.inf, 1.0, 2.0], 2.0),
        ([math.nan, math.nan], math.nan),
    ],
)
def test_median(values: list[float], expected: float) -> None:
    assert median(torch.tensor(values)).item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("tau", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("w_min", [0.0, 0.01, 0.5])
def test_talr_weight_is_a_power_of_the_probability(tau: float, w_min: float) -> None:
    losses, labelled = token_losses(logits(), LABELS)
    found = talr_weights(losses, torch.tensor(tau), w_min)[labelled].tolist()
    probabilities = [math.exp(-loss) for row in loop(logits(), LABELS) for loss in row]
    assert found == pytest.approx([max(p ** (1 / tau), w_min) for p in probabilities], rel=1e-5)


def test_talr_floor_is_reached_and_one_is_the_plain_loss() -> None:
    losses = torch.tensor([0.0, 1.0, 50.0])
    assert talr_weights(losses, torch.tensor(1.0), 0.01)[2] == torch.tensor(0.01)
    assert torch.equal(talr_weights(losses, torch.tensor(1.0), 1.0), torch.ones(3))
    assert not torch.equal(talr_weights(losses, torch.tensor(1.0), 0.01), torch.ones(3))


def test_tau_of_zero_is_the_limit() -> None:
    """Half of the sequences are known by heart: their losses are 0 and so is the median."""
    losses, tau = torch.tensor([0.0, 1e-6, 3.0]), torch.tensor(0.0)
    assert talr_weights(losses, tau, 0.01).tolist() == pytest.approx([1.0, 0.01, 0.01])
    assert flow_weights(losses, tau).tolist() == [1.0, 0.0, 0.0]


def test_flow_weight() -> None:
    losses = torch.tensor([0.5, 1.0, 4.0])
    expected = [math.exp(-0.25), math.exp(-0.5), math.exp(-2.0)]
    assert flow_weights(losses, torch.tensor(2.0)).tolist() == pytest.approx(expected)


def test_gradient_is_the_weighted_one_and_does_not_see_the_weights() -> None:
    """d loss / d logits = w_i (softmax - one-hot) / N at every labelled position, else 0."""
    tau, w_min, tokens = torch.tensor(2.0), 0.1, torch.tensor(7)
    scores = logits().requires_grad_()
    losses, labelled = token_losses(scores, LABELS)
    weights = talr_weights(losses, tau, w_min)
    assert not weights.requires_grad
    weighted_mean(losses, weights, labelled, tokens).backward()
    expected = torch.zeros_like(logits())
    for b, sequence in enumerate(LABELS.tolist()):
        for t, label in enumerate(sequence[1:]):
            if label != NONE:
                p = torch.softmax(logits()[b, t], -1)
                slope = p - torch.nn.functional.one_hot(torch.tensor(label), p.numel())
                expected[b, t] = max(p[label] ** (1 / 2.0), w_min) * slope / 7
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-8)

    through = logits().requires_grad_()
    losses, labelled = token_losses(through, LABELS)
    (losses * torch.exp(-losses / tau).clamp(min=w_min))[labelled].sum().div(7).backward()
    assert through.grad is not None
    assert not torch.allclose(through.grad, expected, rtol=1e-2), "a gradient of w must show"


def test_weights_are_not_normalised() -> None:
    losses, labelled = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    halves = torch.full((1, 2), 0.5)
    assert weighted_mean(losses, halves, labelled, torch.tensor(2)).item() == 0.75


def test_what_has_no_label_has_no_part_whatever_its_weight() -> None:
    """A batch without any label has no tau: its weights are NaN, and its loss is 0."""
    losses, labelled = token_losses(logits(), torch.full_like(LABELS, NONE))
    tau = median(sequence_means(losses, labelled))
    weights = talr_weights(losses, tau, 0.01)
    assert weights.isnan().all()
    assert weighted_mean(losses, weights, labelled, torch.tensor(3)).item() == 0.0
