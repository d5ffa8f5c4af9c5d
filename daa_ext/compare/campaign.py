"""Runs a comparison: one run after another, each once, whatever happens to the others."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from filelock import FileLock, Timeout

from daa_ext.compare.experiment import Experiment
from daa_ext.compare.making import Maker, Result, write_json
from daa_ext.compare.plan import Planner
from daa_ext.compare.progress import Progress
from daa_ext.compare.runs import Run
from daa_ext.compare.table import Table

WAIT_SECONDS = 3.0
WEIGHTS = ("out/*.safetensors", "out/*.safetensors.index.json", "anchor/*.safetensors")


class Campaign:
    """The runs of an experiment, and what is known of them.

    Raises:
        ValueError: a file of the experiment does not exist.
    """

    def __init__(self, experiment: Experiment, planner: Planner) -> None:
        self.experiment = experiment
        self.planner = planner
        self.root = planner.root
        self.maker = Maker(experiment, planner)

    def refuse_changes(self, runs: Iterable[Run]) -> None:
        """Raise ValueError if a run that was begun here was begun with other settings."""
        changes = []
        for run in runs:
            path = self.planner.out(run) / "run.json"
            if path.exists():
                now = json.loads(json.dumps(self.maker.content(run)))
                found = differences(json.loads(path.read_text()), now)
                changes += [(run.id, words) for words in found]
        if changes:
            shown = "\n  ".join(list(dict.fromkeys(words for _, words in changes))[:20])
            raise ValueError(
                f"output={self.root} holds runs that were made with other settings:\n  {shown}\n"
                f"(first seen in {changes[0][0]}). Go back to these settings, or "
                "name another output. More methods, rates and seeds may be added at any time."
            )

    def run(self) -> None:
        """Make and score every run that has no result yet.

        Several processes may do this in one folder at the same time, on other GPUs or nodes: each
        takes a run that nobody works on.
        """
        self.planner.write_data()
        self._since = time.time()
        planned = [*self.planner.first(), *self.planner.grid()]
        with Progress(self.known(planned)) as progress:
            self._run_all(planned, progress)
            later = list({run.id: run for run in self.more_seeds()}.values())
            progress.extend(self.known(later))
            self._run_all(later, progress)

    def _run_all(self, runs: list[Run], progress: Progress) -> None:
        pending = [run for run in runs if self.result(run) is None]
        while pending:
            worked = False
            for run in list(pending):
                if not self._is_over(run) and not self._waits_for_others(run, pending):
                    worked |= self._take(run, progress)
                if self._is_over(run):
                    pending.remove(run)
                    progress.done(run, self.maker.read(run.id) or {})
                    self._purge(runs)
            if pending and not worked:
                time.sleep(WAIT_SECONDS)  # for what another process is making

    def _take(self, run: Run, progress: Progress) -> bool:
        """Make the run, unless another process is doing so."""
        self.planner.out(run).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.planner.out(run) / ".lock", timeout=0):
                if not self._is_over(run):
                    progress.begin(run.id)
                    result = self.maker.make(run, progress.tell)
                    write_json(self.planner.out(run) / "result.json", result)
            return True
        except Timeout:
            return False

    def _waits_for_others(self, run: Run, pending: list[Run]) -> bool:
        needed = {run.anchor, run.origin.id if run.origin else None}
        return any(other.id in needed for other in pending)

    def _is_over(self, run: Run) -> bool:
        """Whether the run has a result, or failed since this campaign began."""
        path = self.planner.out(run) / "result.json"
        if self.result(run) is not None:
            return True
        return path.exists() and path.stat().st_mtime >= self._since

    def result(self, run: Run) -> Result | None:
        """The result of a run that is done; a failed one counts as not done."""
        result = self.maker.read(run.id)
        return None if result is None or result["status"] == "failed" else result

    def results(self) -> list[Result]:
        """All results under the folder, failed ones as well."""
        found = sorted((self.root / "runs").rglob("result.json"))
        return [json.loads(path.read_text()) for path in found]

    def known(self, runs: Iterable[Run]) -> list[tuple[Run, Result | None]]:
        return [(run, self.result(run)) for run in runs]

    def more_seeds(self) -> Iterator[Run]:
        """With tune_seed: every method's other seeds, at the rate that its grid chose."""
        tune = self.experiment.tune_seed
        if tune is None:
            return
        chosen = Table(self.experiment, self.planner.rows, self.results()).best_rates()
        for seed in self.experiment.seeds:
            for domain in self.experiment.domains:
                for row in self.planner.rows:
                    rate = chosen.get((domain, row.name))
                    if rate is None or seed == tune:
                        continue
                    if seed in self.experiment.seeds_of(row.method):
                        for run in self.planner.points(row, domain, seed, only=(rate,)):
                            yield from (run.origin, run) if run.origin else (run,)

    def _purge(self, runs: list[Run]) -> None:
        """Remove the weights that no run still needs."""
        if self.experiment.keep_weights:
            return
        needed = {
            self.planner.out(run.origin)
            for run in runs
            if run.task == "wise" and run.origin is not None and not self._is_over(run)
        }
        for result in (self.root / "runs").rglob("result.json"):
            if result.parent not in needed:
                for pattern in WEIGHTS:
                    for file in result.parent.glob(pattern):
                        file.unlink(missing_ok=True)  # another process may be as fast


def differences(then: Any, now: Any, place: str = "") -> Iterator[str]:
    """ "key: was -> is" for everything that differs between two JSON values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            yield from differences(then.get(key), now.get(key), f"{place}.{key}".lstrip("."))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, pair in enumerate(zip(then, now, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    elif then != now:
        yield f"{place}: {then} -> {now}"
