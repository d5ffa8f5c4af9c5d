"""From results to the numbers of the report: points, best rates, matched scores, tests, costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from daa_ext.compare import stats
from daa_ext.compare.experiment import Experiment, ScoreSet
from daa_ext.compare.runs import BASE, BASE_AGAIN, Row

Half = Literal["select", "report", "all"]
HALVES: tuple[Half, ...] = ("select", "report", "all")
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """S_D, S_G and S of one model on one half of the items; None where it gave no number."""

    domain: float | None
    general: float | None

    @property
    def joint(self) -> float | None:
        if self.domain is None or self.general is None:
            return None
        return stats.harmonic(self.domain, self.general)


@dataclass(frozen=True)
class Point:
    """One scored model: a run of one row, domain, seed and place in the grid."""

    result: Result
    halves: dict[Half, Scores]
    sets: dict[str, dict[str, float]]  # set -> metric -> value, over all items

    @property
    def place(self) -> tuple[float, float]:
        """(learning rate of the grid, alpha)."""
        return (self.result["rate"] or 0.0, self.result["alpha"] or 0.0)

    @property
    def is_scored(self) -> bool:
        return self.halves["all"].joint is not None


@dataclass(frozen=True)
class Best:
    """A row at the place of its grid that its selection half prefers, over its seeds."""

    row: Row
    place: tuple[float, float]
    points: list[Point]

    def values(self, name: str, half: Half) -> dict[int, float]:
        """seed -> score; name: domain, general or joint."""
        found = {p.result["seed"]: getattr(p.halves[half], name) for p in self.points}
        return {seed: value for seed, value in found.items() if value is not None}


class Table:
    """All results of an experiment, by domain and row."""

    def __init__(
        self, experiment: Experiment, rows: Sequence[Row], results: Sequence[Result]
    ) -> None:
        self.experiment = experiment
        self.rows = list(rows)
        self.results = list(results)
        self._by_id = {result["id"]: result for result in results}

    def by_id(self, run_id: str | None) -> Result | None:
        return self._by_id.get(str(run_id))

    def anchor_of(self, result: Result) -> Result | None:
        """The run that built the anchor of a DAA run."""
        return self.by_id(result.get("anchor"))

    def base(self, domain: str, again: bool = False) -> Point | None:
        result = self._by_id.get(BASE_AGAIN if again else BASE)
        return self.point(domain, result) if result and "score" in result else None

    def points(self, domain: str, row: str) -> list[Point]:
        """The scored runs of a row, along its grid."""
        found = [
            self.point(domain, result)
            for result in self.results
            if (result["domain"], result["row"]) == (domain, row) and "score" in result
        ]
        return sorted(found, key=lambda point: (point.place, point.result["seed"]))

    def best(self, domain: str, row: Row) -> Best | None:
        """The row at its best place. A control is shown where its DAA method is best."""
        points = [point for point in self.points(domain, row.name) if point.is_scored]
        if row.method.kind == "control":
            origin = next(r for r in self.rows if r.name == row.method.of)
            best = self.best(domain, origin)
            place = best.place if best else None
        else:
            place = self._preferred(row, points)
        chosen = [point for point in points if point.place == place]
        return Best(row, chosen[0].place, chosen) if chosen else None

    def _preferred(self, row: Row, points: Sequence[Point]) -> tuple[float, float] | None:
        seeds = self.experiment.grid_seeds(row.method)
        scores: dict[tuple[float, float], list[float]] = {}
        for point in points:
            joint = point.halves["select"].joint
            if joint is not None and point.result["seed"] in seeds:
                scores.setdefault(point.place, []).append(joint)
        return max(scores, key=lambda place: stats.mean(scores[place]), default=None)

    def best_rates(self) -> dict[tuple[str, str], float]:
        """(domain, row) -> the learning rate that the grid chose."""
        found = {}
        for domain in self.experiment.domains:
            for row in self.rows:
                if (best := self.best(domain, row)) is not None:
                    found[domain, row.name] = best.place[0]
        return found

    def target(self, domain: str) -> float | None:
        """S_D at which methods are matched: the base's plus `match_at` of the reference's gain."""
        base = self.base(domain)
        reached = [_domain_score(p) for p in self.points(domain, self.experiment.reference)
                   if p.is_scored and p.result["seed"] in self._matched_seeds()]  # fmt: skip
        if base is None or not base.is_scored or not reached:
            return None
        start = _domain_score(base)
        return start + self.experiment.match_at * (max(reached) - start)

    def matched(self, domain: str, row: Row) -> dict[str, dict[int, float]]:
        """S_G, and each general loss, at the target: name -> seed -> value.

        Seeds whose curve does not get there have none.
        """
        target = self.target(domain)
        losses = [each.name for each in self.experiment.general if each.kind == "loss"]
        found: dict[str, dict[int, float]] = {name: {} for name in ("S_G", *losses)}
        if target is None:
            return found
        for seed in self.experiment.grid_seeds(row.method):
            for name in found:
                best = max if name == "S_G" else min
                values = [
                    value
                    for curve in self._curves(domain, row, seed)
                    if (value := stats.at_domain_score(_pairs(curve, name), target, best))
                    is not None
                ]
                if values:
                    found[name][seed] = best(values)
        return found

    def _curves(self, domain: str, row: Row, seed: int) -> Iterator[list[Point]]:
        """From the base model along the grid; for WiSE-FT one for each rate that it starts from."""
        base = self.base(domain)
        assert base is not None
        points = [p for p in self.points(domain, row.name) if p.result["seed"] == seed]
        if row.method.kind != "wise":
            yield [base, *(point for point in points if point.is_scored)]
            return
        origins = self.points(domain, str(row.method.of))
        for rate in dict.fromkeys(point.place[0] for point in points):
            ends = [p for p in origins if (p.place[0], p.result["seed"]) == (rate, seed)]
            along = [base, *(p for p in points if p.place[0] == rate), *ends]
            yield [point for point in along if point.is_scored]

    def _matched_seeds(self) -> list[int]:
        reference = self.experiment.methods[self.experiment.reference]
        return self.experiment.grid_seeds(reference)

    def point(self, domain: str, result: Result) -> Point:
        scored = result["score"]["sets"]
        values = {
            half: Scores(
                self._mean(self.experiment.domains[domain].score, scored, half),
                self._mean(self.experiment.general, scored, half),
            )
            for half in HALVES
        }
        metrics = {
            each.name: {k: v for k, v in scored[each.name]["metrics"].items() if v is not None}
            for each in self.experiment.sets(domain)
            if each.name in scored
        }
        return Point(result, values, metrics)

    def _mean(
        self, sets: Sequence[ScoreSet], scored: Mapping[str, Any], half: Half
    ) -> float | None:
        """Mean over the sets that count in this half; None if one of them gave no number."""
        values = []
        for each in sets:
            if each.counted is None or (each.use not in ("both", half) and half != "all"):
                continue
            values.append(_value(each, scored.get(each.name), half))
        if not values or None in values:
            return None
        return stats.mean([value for value in values if value is not None])


def _value(each: ScoreSet, found: Mapping[str, Any] | None, half: Half) -> float | None:
    assert each.counted is not None
    if found is None or found.get("diverged"):
        return None
    items = found.get("items")
    metric = stats.METRICS.get(each.counted)
    if not items or metric is None or each.use != "both" or half == "all":
        # a harness metric of its own has no items to halve: it counts whole in both halves
        return found["metrics"].get(each.counted, found["metrics"].get(found.get("metric", "")))
    return metric(items[0::2] if half == "select" else items[1::2])


def _domain_score(point: Point) -> float:
    score = point.halves["all"].domain
    assert score is not None
    return score


def _pairs(curve: Sequence[Point], name: str) -> list[stats.Pair]:
    """(S_D, S_G), or (S_D, loss of the set `name`), of the points that have both."""
    pairs = []
    for point in curve:
        value = point.halves["all"].general if name == "S_G" else point.sets[name].get("loss")
        if value is not None:
            pairs.append((_domain_score(point), value))
    return pairs
