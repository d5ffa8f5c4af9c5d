"""The rows of a comparison's table, and the runs that fill them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from daa_ext.compare.experiment import Experiment, Method, ScoreSet

ANCHOR_SAMPLES = "anchor.max_samples"  # a sweep over it builds other anchors (table 12)
BASE, BASE_AGAIN = "base-1", "base-2"  # the second one gives the noise floor


@dataclass(frozen=True)
class Row:
    """One row of the table: a method of the file, or one value of its sweep."""

    name: str
    method: Method
    swept: tuple[str, Any] | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """The YAML keys that the row adds to its kind's."""
        extra = {} if self.swept is None or self.swept[0] == ANCHOR_SAMPLES else [self.swept]
        return {**self.method.keys, **dict(extra)}

    @property
    def anchor_samples(self) -> int | None:
        return self.swept[1] if self.swept and self.swept[0] == ANCHOR_SAMPLES else None


@dataclass(frozen=True)
class Run:
    """One folder under runs/: something to train or to make, and to score."""

    id: str
    task: str  # base | anchor | noise | train | wise
    domain: str | None = None
    row: str | None = None
    seed: int = 0
    rate: float | None = None  # learning_rate; None for a control until its DAA run is done
    alpha: float | None = None
    origin: "Run | None" = None  # the run that a wise or control run is made from
    yaml: Mapping[str, Any] = field(default_factory=dict)
    sets: tuple[ScoreSet, ...] = ()

    anchor: str | None = None  # the anchor run that must be done before


def rows_of(experiment: Experiment, name: str) -> Iterator[Row]:
    """A method's rows: one, or one for each value of its sweep."""
    method = experiment.methods[name]
    if not method.sweep:
        yield Row(name, method)
        return
    for key, values in method.sweep.items():
        for value in values:
            yield Row(f"{name} {key}={value}", method, (key, value))


def slug(name: str) -> str:
    """A folder name: what is not a letter, digit, dot or dash becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9.\-]+", "_", name)
