"""The retention card: what the domain gained and what general ability kept, in one small table.

Forward passes only. Measuring never changes the run: random number generators are put back.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from daa_ext.fragments import Fragment

Scores = dict[str, float]  # metric name ("loss", "accuracy") -> value
CHUNK = 1 << 22


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Run the block, then put the Python, NumPy and torch generators back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@dataclass
class RetentionCard:
    """Scores per measured set ("domain", "general", ...) at the steps where they were taken."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # {"step": t, set: Scores}
    weights: dict[str, int] = field(default_factory=dict)

    def record(self, step: int, scores: Mapping[str, Scores]) -> None:
        """Keep the scores at `step`; a second measurement of the same step replaces the first."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows.pop()
        self.rows.append({"step": step, **scores})

    def summary(self) -> dict[str, Any]:
        """Base, final and their difference per set and metric, for daa_report.json."""
        assert self.rows
        base, final = self.rows[0], self.rows[-1]
        sets: dict[str, Any] = {}
        for name in (key for key in final if key != "step"):
            sets[name] = {
                metric: {
                    "base": base[name][metric],
                    "final": value,
                    "delta": value - base[name][metric],
                }
                for metric, value in final[name].items()
            }
        return {"sets": sets, "weights": self.weights, "rows": self.rows}

    def table(self) -> Table:
        table = Table(title="Retention card", title_justify="left")
        for column in ("set", "metric", "base", "final", "change"):
            table.add_column(column, justify="left" if column in ("set", "metric") else "right")
        for name, metrics in self.summary()["sets"].items():
            for metric, values in metrics.items():
                better = (values["delta"] < 0) == (metric == "loss") and values["delta"] != 0
                table.add_row(
                    name,
                    metric,
                    f"{values['base']:.4f}",
                    f"{values['final']:.4f}",
                    f"{values['delta']:+.4f} {'(better)' if better else ''}",
                )
        if self.weights:
            share = self.weights["changed"] / max(1, self.weights["total"])
            bf16 = self.weights["changed_in_bf16"] / max(1, self.weights["total"])
            table.caption = (
                f"weights changed: {self.weights['changed']:,} of {self.weights['total']:,} "
                f"({share:.1%}); {bf16:.1%} also when rounded to bf16"
            )
        return table

    def print(self) -> None:
        Console(width=92).print(self.table())


def snapshot(weights: Iterable[tuple[Fragment, Tensor]]) -> dict[str, Tensor]:
    """Copies of weights on the CPU (their own bytes, in host memory), by parameter name."""
    return {fragment.name: flat.to("cpu", copy=True) for fragment, flat in weights}


def count_changed(
    before: Mapping[str, Tensor], weights: Iterable[tuple[Fragment, Tensor]]
) -> dict[str, int]:
    """How many weights differ from `before`: as trained, and rounded to bf16 as on export."""
    counts = {"total": 0, "changed": 0, "changed_in_bf16": 0}
    for fragment, new_flat in weights:
        old_flat = before[fragment.name]
        counts["total"] += old_flat.numel()
        for start in range(0, old_flat.numel(), CHUNK):
            old, new = old_flat[start : start + CHUNK], new_flat[start : start + CHUNK].cpu()
            counts["changed"] += int((old != new).sum())
            counts["changed_in_bf16"] += int((old.bfloat16() != new.bfloat16()).sum())
    return counts
