"""What `daa compare` shows while it runs: how far it is, what runs, how long it will take."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from daa_ext.compare.runs import Run

Known = list[tuple[Run, dict[str, Any] | None]]


class Progress:
    """A bar over all runs with the time left, and one line for each that ends.

    The time left is the mean time of the runs of the same row that are done, else of the same
    task, else of all.
    """

    def __init__(self, known: Known) -> None:
        self.console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"), console=self.console, transient=True,
            refresh_per_second=2,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=0, left="")
        self._pending: dict[str, Run] = {}
        self._seconds: list[tuple[Run, float]] = []
        self._current = ""
        self._since = time.monotonic()
        self._count = 0
        self.extend(known)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def extend(self, known: Known) -> None:
        """More runs: with their results where they are done."""
        for run, result in known:
            self._count += 1
            if result is None:
                self._pending[run.id] = run
            else:
                self._seconds.append((run, result["seconds"]))
        self._bar.update(self._task, total=self._count, completed=self._count - len(self._pending))

    def begin(self, run_id: str) -> None:
        self._current = run_id
        self._since = time.monotonic()
        self.tell("")

    def tell(self, words: str) -> None:
        """Where the current run stands."""
        left = self.seconds_left()
        self._bar.update(
            self._task,
            description=f"{self._current} {words}".strip(),
            left=f"about {duration(left)} left" if left is not None else "",
        )

    def done(self, run: Run, result: dict[str, Any]) -> None:
        self._pending.pop(run.id, None)
        self._seconds.append((run, result["seconds"]))
        completed = self._count - len(self._pending)
        self._bar.update(self._task, completed=completed)
        left = self.seconds_left()
        words = f"[{completed}/{self._count}] {run.id}: {result['status']}"
        words += f" in {duration(result['seconds'])}"
        if result["reason"]:
            words += f" ({result['reason']})"
        if left:
            words += f"; about {duration(left)} left"
        self.console.print(words, highlight=False, markup=False)

    def seconds_left(self) -> float | None:
        """Estimate for all that is not done; None while nothing is known."""
        if not self._seconds:
            return None
        left = sum(self._estimate(run) for run in self._pending.values())
        return max(0.0, left - (time.monotonic() - self._since))

    def _estimate(self, run: Run) -> float:
        same_row = [
            s for other, s in self._seconds if (other.row, other.task) == (run.row, run.task)
        ]
        same_task = [s for other, s in self._seconds if other.task == run.task]
        times = same_row or same_task or [s for _, s in self._seconds]
        return sum(times) / len(times)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
