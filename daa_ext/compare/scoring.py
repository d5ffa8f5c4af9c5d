"""What a model can be scored on: the sets, their rows, their metrics. No torch, no model.

docs/scoring.md has the formats. `check` is for before anything runs: it reads every row of every
file, so that a comparison does not find a bad line after its training runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from daa_ext.compare import harness, stats
from daa_ext.compare.data import evenly
from daa_ext.compare.rows import Row, labels_of, read_rows

# Of each kind: the keys that have an effect besides name, kind and metric; its metrics, first the
# one that counts unless the set names another. A task of the harness has its own metrics.
KEYS: dict[str, set[str]] = {
    "labels": {"path", "max_samples", "labels", "normalise"},
    "choice": {"path", "max_samples", "normalise"},
    "loss": {"path", "max_samples"},
    "harness": {"task", "dataset_path", "num_fewshot", "limit"},
}
METRICS = {
    "labels": ("accuracy", "f1"),
    "choice": ("accuracy",),
    "loss": ("loss", "perplexity"),
}


@dataclass(frozen=True)
class SetSpec:
    """One entry of a job's `sets`; see docs/scoring.md."""

    name: str
    kind: str
    path: str | None = None
    max_samples: int | None = None
    labels: list[str] | None = None
    normalise: bool = True
    metric: str | None = None
    task: str | None = None
    dataset_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> "SetSpec":
        """The set of a mapping.

        Raises:
            ValueError: a key is unknown, missing, has no effect, or its value is not allowed.
        """
        here = f"score set {entry.get('name')!r}"
        known = [field.name for field in fields(cls)]
        for key in entry.keys() - set(known):
            near = get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
            raise ValueError(f"{here}: {key}={entry[key]!r} is not a key of a score set: {mend}")
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            raise ValueError(f"{here}: name must be a text that is not empty.")
        if entry.get("kind") not in KEYS:
            raise ValueError(
                f"{here}: kind={entry.get('kind')!r} must be one of {', '.join(KEYS)}."
            )
        spec = cls(**entry)
        spec._check(here)
        return spec

    def _check(self, here: str) -> None:
        of_kind = {"name", "kind", "metric"} | KEYS[self.kind]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in of_kind and value not in (None, field.default):
                raise ValueError(
                    f"{here}: {field.name}={value!r} has no effect with kind={self.kind}. Remove "
                    "it."
                )
        needed = "task" if self.kind == "harness" else "path"
        if not isinstance(getattr(self, needed), str):
            raise ValueError(f"{here}: kind={self.kind} needs {needed}; it is not given.")
        for name, least in (("max_samples", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= least):
                raise ValueError(f"{here}: {name}={value!r} must be an integer, {least} or more.")
        if self.kind in METRICS and self.metric not in (None, *METRICS[self.kind]):
            raise ValueError(
                f"{here}: metric={self.metric!r} cannot be had of kind={self.kind}: one of "
                f"{', '.join(METRICS[self.kind])}."
            )
        if self.labels is not None:
            texts = all(isinstance(label, str) and label for label in self.labels)
            if not texts or len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
                raise ValueError(
                    f"{here}: labels={self.labels!r} must be two or more different texts, none "
                    "empty."
                )


def check(sets: Sequence[Mapping[str, Any]]) -> None:
    """Refuse sets that cannot be scored, before any model is loaded.

    Raises:
        ValueError: names the set, the file, the line and the key, and how to mend it.
    """
    specs = [SetSpec.parse(entry) for entry in sets]
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"score set {twice[0]!r} is given twice: give each set its own name.")
    for spec in specs:
        if spec.kind == "harness":
            harness.check(spec.name, str(spec.task), spec.dataset_path, spec.metric)
        else:
            read(spec)


def read(spec: SetSpec) -> tuple[list[Row], list[str]]:
    """The rows to score, all of the file checked, and the labels (kind labels; else none).

    Raises:
        ValueError: as in `check`.
    """
    rows = read_rows(spec.name, spec.kind, str(spec.path))
    labels = labels_of(spec.name, rows, spec.labels) if spec.kind == "labels" else []
    return evenly(rows, spec.max_samples), labels


def choice_result(
    spec: SetSpec,
    truths: Sequence[Any],
    scores: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The result of kind labels or choice: the best score of each row is what was found.

    Args:
        truths: of each row, the right label, or the position of the right choice.
        scores: of each row, one score for each answer.
        labels: what the positions stand for; None: themselves.
    """
    finite = all(math.isfinite(score) for row in scores for score in row)
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    found: list[Any] = [labels[i] for i in best] if labels else best
    items = [
        {"truth": truth, "found": answer if finite else None, "scores": [_finite(s) for s in row]}
        for truth, answer, row in zip(truths, found, scores, strict=True)
    ]
    metrics = {
        name: stats.METRICS[name](items) if finite else math.nan for name in METRICS[spec.kind]
    }
    return result(spec, metrics, items)


def loss_result(spec: SetSpec, losses: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """The result of kind loss, of summed losses (nats) and numbers of scored tokens."""
    mean = sum(losses) / sum(tokens)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    pairs = zip(losses, tokens, strict=True)
    items = [{"loss": _finite(loss), "tokens": count} for loss, count in pairs]
    return result(spec, {"loss": mean, "perplexity": perplexity}, items)


def result(
    spec: SetSpec, metrics: Mapping[str, float], items: list[dict[str, Any]], n: int | None = None
) -> dict[str, Any]:
    """One set's entry in the output; a metric that is not finite is null and says `diverged`."""
    plain = {name: _finite(value) for name, value in metrics.items()}
    entry = {
        "kind": spec.kind,
        "n": len(items) if n is None else n,
        "metric": spec.metric or next(iter(plain)),
        "metrics": plain,
        "items": items,
    }
    return entry | ({"diverged": True} if None in plain.values() else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
