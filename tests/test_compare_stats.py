"""The maths of a comparison, against hand-worked numbers and against scipy's definitions."""

import math
import random

import pytest

from daa_ext.compare import stats
from daa_ext.compare.data import evenly
from daa_ext.noise import gradient_noise


def test_harmonic_mean() -> None:
    assert stats.harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert stats.harmonic(0.4, 0.4) == pytest.approx(0.4)
    assert stats.harmonic(0.0, 0.9) == 0.0
    assert stats.harmonic(0.0, 0.0) == 0.0


def test_accuracy_of_both_kinds_of_items() -> None:
    assert stats.accuracy([{"truth": "a", "found": "a"}, {"truth": "a", "found": "b"}]) == 0.5
    assert stats.accuracy([{"truth": 0, "found": 0}]) == 1.0
    assert stats.accuracy([{"correct": 0}, {"correct": 1}, {"correct": 1}]) == pytest.approx(2 / 3)


def test_weighted_f1_by_hand() -> None:
    """a: precision 1, recall 1/2, F1 2/3, weight 2; b: precision 1/2, recall 1, F1 2/3, weight 1;
    c is found and never true: weight 0."""
    pairs = [("a", "a"), ("a", "b"), ("b", "b")]
    items = [{"truth": t, "found": f} for t, f in pairs]
    assert stats.weighted_f1(items) == pytest.approx(2 / 3)
    assert stats.weighted_f1([{"truth": "a", "found": "c"}]) == 0.0


def test_token_loss_weights_by_tokens() -> None:
    items = [{"loss": 3.0, "tokens": 1}, {"loss": 1.0, "tokens": 3}]
    assert stats.token_loss(items) == pytest.approx(1.0)


def test_standard_error_is_that_of_a_simulation() -> None:
    rng = random.Random(0)
    shares = [sum(rng.random() < 0.3 for _ in range(50)) / 50 for _ in range(4000)]
    assert stats.standard_error(0.3, 50) == pytest.approx(stats.deviation(shares), rel=0.05)


def test_deviation_needs_two_values() -> None:
    assert stats.deviation([1.0]) is None
    assert stats.deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2.0))


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(0.0, 1.0), (1.0, 0.0)], 0.25, 0.75),
        ([(0.0, 1.0), (1.0, 0.0)], 1.0, 0.0),  # a point of the curve itself
        ([(0.0, 1.0), (1.0, 0.0)], 1.5, None),  # never reached
        ([(0.2, 0.5)], 0.2, 0.5),
        ([], 0.2, None),
        # up, then down again past the target: the better crossing counts
        ([(0.0, 1.0), (1.0, 0.5), (0.0, 0.0)], 0.5, 0.75),
        ([(0.0, 0.0), (1.0, 0.5), (0.0, 1.0)], 0.5, 0.75),
    ],
)
def test_scores_at_the_same_domain_score(
    curve: list[tuple[float, float]], target: float, expected: float | None
) -> None:
    found = stats.at_domain_score(curve, target)
    assert found == (None if expected is None else pytest.approx(expected))


def test_losses_at_the_same_domain_score_are_the_lowest() -> None:
    curve = [(0.0, 1.0), (1.0, 2.0), (0.0, 9.0)]
    assert stats.at_domain_score(curve, 0.5, min) == pytest.approx(1.5)
    assert stats.at_domain_score(curve, 0.5, max) == pytest.approx(5.5)


def test_pareto_front() -> None:
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.3), (0.9, 0.1)]
    assert stats.pareto_front(points) == [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)]
    assert stats.pareto_front([]) == []


def test_paired_test_uses_the_seeds_that_both_have() -> None:
    ours = {1: 0.50, 2: 0.61, 3: 0.72, 9: 0.0}
    theirs = {1: 0.40, 2: 0.50, 3: 0.60, 8: 1.0}
    differences = [0.10, 0.11, 0.12]
    t = stats.mean(differences) / (stats.deviation(differences) / math.sqrt(3))
    # Student's t with 2 degrees of freedom has a closed form
    assert stats.paired_test(ours, theirs) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert stats.paired_test({1: 0.5}, {1: 0.4}) is None
    assert stats.paired_test({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6}) is None
    assert 0.31 - 0.29 != 0.30 - 0.28, "alike but for rounding"
    assert stats.paired_test({1: 0.31, 2: 0.30}, {1: 0.29, 2: 0.28}) is None


def test_welch_test() -> None:
    same = stats.welch_test([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    apart = stats.welch_test([0.1, 0.2, 0.3], [10.1, 10.2, 10.3])
    assert same == pytest.approx(1.0)
    assert apart is not None
    assert apart < 1e-4
    assert stats.welch_test([0.1], [0.2, 0.3]) is None
    assert stats.welch_test([0.1, 0.1], [0.2, 0.3]) is None


def test_evenly_spaced_rows() -> None:
    rows = list(range(10))
    assert evenly(rows, 5) == [0, 2, 4, 6, 8]
    assert evenly(rows, 3) == [0, 3, 6]
    assert evenly(rows, 10) == evenly(rows, 99) == evenly(rows, None) == rows


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999999])
def test_gradient_noise_is_unbiased(beta: float) -> None:
    """Gaussian gradients of known signal and noise: the mean of many estimates is the truth."""
    rng = random.Random(1)
    size, steps, batch, signal, spread = 8, 6, 4.0, 1.5, 2.0
    found = []
    for _ in range(3000):
        gradients = [[signal + rng.gauss(0.0, spread) for _ in range(size)] for _ in range(steps)]
        moment = [0.0] * size
        for gradient in gradients:
            moment = [beta * m + (1 - beta) * g for m, g in zip(moment, gradient, strict=True)]
        mean = [m / (1 - beta**steps) for m in moment]
        norms = [math.hypot(*gradient) for gradient in gradients]
        noise = gradient_noise(norms, math.hypot(*mean), beta, batch)
        assert noise is not None
        found.append((noise.signal, noise.trace))
    signals, traces = zip(*found, strict=True)
    assert stats.mean(signals) == pytest.approx(size * signal**2, rel=0.1)
    assert stats.mean(traces) == pytest.approx(size * spread**2 * batch, rel=0.1)


def test_gradient_noise_has_no_scale_below_the_noise() -> None:
    for norms, beta in (([1.0], 0.9), ([1.0, 1.0], 0.0), ([], 0.9)):
        assert gradient_noise(norms, 1.0, beta, 1.0) is None
    noise = gradient_noise([1.0, 1.0], 0.0, 0.999, 2.0)
    assert noise is not None
    assert noise.signal < 0.0
    assert noise.scale is None
    clean = gradient_noise([2.0, 2.0], 2.0, 0.9, 2.0)
    assert clean is not None
    assert (clean.trace, clean.scale) == (pytest.approx(0.0), pytest.approx(0.0))
