"""The maths of a comparison: scores, curves, matched scores, tests. No files, no settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

from scipy.stats import ttest_ind, ttest_rel
from sklearn.metrics import f1_score

Items = Sequence[Mapping[str, Any]]
Pair = tuple[float, float]
ROUNDING = 1e-12  # of scores and losses, which are of the order of 1


def harmonic(domain: float, general: float) -> float:
    """S = 2 S_D S_G / (S_D + S_G) (DAA paper, eq. 13 and 14); 0 where both are 0."""
    total = domain + general
    return 2.0 * domain * general / total if total > 0.0 else 0.0


def accuracy(items: Items) -> float:
    """Share of items that are right: {truth, found} or {correct: 0 or 1}."""
    right = sum(bool(each["correct"]) if "correct" in each else each["truth"] == each["found"]
                for each in items)  # fmt: skip
    return right / len(items)


def weighted_f1(items: Items) -> float:
    """F1 of each label, weighted by how often it is true; items {truth, found}."""
    truth, found = [each["truth"] for each in items], [each["found"] for each in items]
    return float(f1_score(truth, found, average="weighted", zero_division=0.0))


def token_loss(items: Items) -> float:
    """Mean loss per token in nats; items {loss: summed, tokens}."""
    return sum(each["loss"] for each in items) / sum(each["tokens"] for each in items)


METRICS = {"accuracy": accuracy, "f1": weighted_f1, "loss": token_loss}


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent items (binomial)."""
    return sqrt(share * (1.0 - share) / count)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def at_domain_score(
    curve: Sequence[Pair], target: float, best: Callable[..., float] = max
) -> float | None:
    """The value at which a curve of (S_D, value) crosses S_D = target.

    The curve is walked in its order (the base model, then growing learning rate) and taken as
    straight between its points. Where it crosses more than once, the best value counts (`max` for
    scores, `min` for losses): every method is given its most favourable point. None where it never
    gets there.
    """
    found = [value for domain, value in curve if domain == target]
    for (d0, v0), (d1, v1) in pairwise(curve):
        if min(d0, d1) < target < max(d0, d1):
            found.append(v0 + (v1 - v0) * (target - d0) / (d1 - d0))
    return best(found) if found else None


def pareto_front(points: Iterable[Pair]) -> list[Pair]:
    """The points that no other beats in both scores, by growing S_D."""
    front: list[Pair] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """p of the paired t test over the seeds that both have; None for fewer than two.

    Also None where all differences are one and the same number but for rounding: the test has no
    spread to use.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if len(seeds) < 2 or max(differences) - min(differences) < ROUNDING:
        return None
    return float(ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).pvalue)


def welch_test(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """p of Welch's t test; None with fewer than two values, or no spread, on either side."""
    if min(len(set(ours)), len(set(theirs))) < 2:
        return None
    return float(ttest_ind(ours, theirs, equal_var=False).pvalue)
