"""The numbers of the report, per domain: one mapping for Markdown, JSON and pictures alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from daa_ext.compare import stats
from daa_ext.compare.runs import Row
from daa_ext.compare.table import Best, Point, Table

SCORES = {"S_D": "domain", "S_G": "general", "S": "joint"}
Summary = dict[str, Any]


def summarise(table: Table, domain: str) -> Summary:
    """Everything that the report says of one domain."""
    base = table.base(domain)
    rows = [_row(table, domain, row) for row in table.rows]
    return {
        "target": table.target(domain),
        "base": _base(base) if base else None,
        "rows": [row for row in rows if row is not None],
    }


def noise_floor(table: Table) -> list[Summary]:
    """Per set: the base model scored twice, and the standard error over the set's items."""
    found = []
    for domain in table.experiment.domains:
        first, second = table.base(domain), table.base(domain, again=True)
        if first is None or second is None:
            continue
        for each in table.experiment.sets(domain):
            metric = each.counted or "loss"
            values = [point.sets.get(each.name, {}).get(metric) for point in (first, second)]
            count = first.result["score"]["sets"][each.name]["n"]
            error = None
            if metric == "accuracy" and values[0] is not None:
                error = stats.standard_error(values[0], count)
            row = {"set": each.name, "metric": metric, "first": values[0], "second": values[1]}
            row |= {"n": count, "standard_error": error}
            if row not in found:
                found.append(row)
    return found


def _base(base: Point) -> Summary:
    report = base.halves["report"]
    return {
        **{name: getattr(report, key) for name, key in SCORES.items()},
        "sets": base.sets,
    }


def _row(table: Table, domain: str, row: Row) -> Summary | None:
    best = table.best(domain, row)
    if best is None:
        return None
    matched = table.matched(domain, row)
    methods = table.experiment.methods
    grid_seeds = table.experiment.grid_seeds(row.method)
    return {
        "row": row.name,
        "method": next(name for name, m in methods.items() if m is row.method),
        "kind": row.method.kind,
        "swept": list(row.swept) if row.swept else None,
        "rate": best.place[0],
        "learning_rate": best.points[0].result.get("learning_rate"),
        "alpha": best.place[1] or None,
        "seeds": [point.result["seed"] for point in best.points],
        "scores": {
            name: _spread(list(best.values(key, "report").values())) for name, key in SCORES.items()
        },
        "change": _changes(table, domain, best),
        "tests": _tests(table, domain, best),
        "against": _against(table, domain, best),
        "sets": _sets(best.points),
        "matched": {name: _spread(list(values.values())) for name, values in matched.items()},
        "matched_of": len(grid_seeds),
        "cost": _cost(table, row, best),
    }


def _spread(values: Sequence[float]) -> Summary:
    if not values:
        return {"mean": None, "sd": None, "n": 0}
    return {"mean": stats.mean(values), "sd": stats.deviation(values), "n": len(values)}


def _changes(table: Table, domain: str, best: Best) -> Summary:
    base = table.base(domain)
    found: Summary = {}
    for name, key in SCORES.items():
        start: float | None = getattr(base.halves["report"], key) if base else None
        values = list(best.values(key, "report").values())
        found[name] = stats.mean(values) - start if start is not None and values else None
    return found


def _tests(table: Table, domain: str, best: Best) -> Summary:
    """p values against the reference at its own best place, over seeds, of the report half."""
    other = _reference(table, domain, best)
    if other is None:
        return {name: {"paired": None, "welch": None} for name in SCORES}
    found = {}
    for name, key in SCORES.items():
        ours, theirs = best.values(key, "report"), other.values(key, "report")
        found[name] = {
            "paired": stats.paired_test(ours, theirs),
            "welch": stats.welch_test(list(ours.values()), list(theirs.values())),
        }
    return found


def _against(table: Table, domain: str, best: Best) -> Summary:
    """set -> what it measures here minus the reference's, over the seeds of both, all items.

    Of a set that enters S_D or S_G its metric, of the others the loss.
    """
    other = _reference(table, domain, best)
    found: Summary = {}
    if other is None:
        return found
    for each in table.experiment.sets(domain):
        metric = each.counted or "loss"
        ours, theirs = (
            {p.result["seed"]: value for p in side.points
             if (value := p.sets.get(each.name, {}).get(metric)) is not None}
            for side in (best, other)
        )  # fmt: skip
        differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if len(differences) > 1:
            p = stats.paired_test(ours, theirs)
            found[each.name] = {**_spread(differences), "metric": metric, "paired": p}
    return found


def _reference(table: Table, domain: str, best: Best) -> Best | None:
    """The reference at its own best place; None for the reference itself."""
    wanted = table.experiment.methods[table.experiment.reference]
    row = next(row for row in table.rows if row.method is wanted)
    return None if row.name == best.row.name else table.best(domain, row)


def _sets(points: Sequence[Point]) -> dict[str, dict[str, Summary]]:
    names = dict.fromkeys(name for point in points for name in point.sets)
    return {
        name: {
            metric: _spread([p.sets[name][metric] for p in points if metric in p.sets[name]])
            for metric in dict.fromkeys(m for p in points for m in p.sets[name])
        }
        for name in names
    }


def _cost(table: Table, row: Row, best: Best) -> Summary:
    """Of one run, means over its seeds; what it is made from is counted in.

    The anchor's share is its cost over the number of domains: one anchor serves them all.
    """
    paid = [_paid(table, point.result) for point in best.points]
    anchors = [table.anchor_of(point.result) for point in best.points]
    found: Summary = {
        key: stats.mean([each[key] for each in paid]) for key in ("seconds", "gpu_hours")
    }
    peaks = [peak for each in paid if (peak := each["peak"]) is not None]
    found["peak_bytes"] = max(peaks, default=None)
    anchor = anchors[0]
    domains = len(table.experiment.domains)
    found["anchor_seconds"] = anchor["train"]["seconds"] if anchor else 0.0
    found["anchor_share_seconds"] = found["anchor_seconds"] / domains
    found["anchor_gpu_hours"] = anchor["train"]["gpu_hours"] if anchor else 0.0
    return found


def _paid(table: Table, result: Mapping[str, Any]) -> Summary:
    train = result.get("train")
    if train is not None:
        peak = train["peak_gpu_memory"] or train["peak_memory"]
        return {"seconds": train["seconds"], "gpu_hours": train["gpu_hours"], "peak": peak}
    origin = table.by_id(result["origin"])
    made = result["seconds"] - result["score"]["seconds"]
    paid = _paid(table, origin) if origin else {"seconds": 0.0, "gpu_hours": 0.0, "peak": None}
    return {**paid, "seconds": paid["seconds"] + made}
