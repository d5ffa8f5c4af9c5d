"""Makes one run of a comparison: trains or interpolates a model, scores it, keeps what it cost."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from daa_ext.compare import process
from daa_ext.compare.data import fingerprint_files, fingerprint_model
from daa_ext.compare.experiment import Experiment
from daa_ext.compare.plan import Planner
from daa_ext.compare.runs import Run
from daa_ext.wise import interpolate

Result = dict[str, Any]  # result.json of one run
Tell = Callable[[str], None]  # shows where the run stands
FAILED: Result = {"status": "failed"}


class RunError(Exception):
    """A run that ends without a result; the others go on."""


class Maker:
    """Makes runs, one at a time. Every file of a run lies in its folder runs/ID."""

    def __init__(self, experiment: Experiment, planner: Planner) -> None:
        self.experiment = experiment
        self.planner = planner
        files = planner.data.files(planner.datasets())
        scored = {
            file
            for each in experiment.all_sets()
            if (file := each.file(experiment.dataset_dir)) is not None
        }
        self._prints = {
            "model": fingerprint_model(experiment.base_model),
            "files": fingerprint_files([*files, *sorted(scored)]),
        }

    def content(self, run: Run) -> dict[str, Any]:
        """What a run depends on. The data are those of the whole experiment: simple and safe."""
        names = str(run.yaml.get("dataset", "")).split(",") if run.yaml else []
        curves = self.experiment.curves if "eval_dataset" in run.yaml else None
        return {
            **self._prints,
            "yaml": dict(run.yaml),
            "data": {name: self.planner.data.entries[name] for name in names},
            "curves": curves.model_dump() if curves is not None else None,
            "sets": [each.model_dump() for each in run.sets],
            "score": self.experiment.score.model_dump(),
        }

    def make(self, run: Run, tell: Tell) -> Result:
        """Make and score the run; what stops it becomes its row, not an exception."""
        folder = self.planner.out(run)
        (folder / "result.json").unlink(missing_ok=True)
        write_json(folder / "run.json", self.content(run))
        result: Result = {
            **{key: getattr(run, key) for key in ("id", "task", "domain", "row", "seed", "rate")},
            "alpha": run.alpha, "origin": run.origin and run.origin.id, "anchor": run.anchor,
            "status": "done", "reason": "", "learning_rate": None,
        }  # fmt: skip
        started = time.monotonic()
        try:
            self._refuse_without_sources(run)
            model = self._model(run, result, tell)
            if run.sets:
                result["score"] = self._score(run, model, tell)
        except RunError as error:
            result |= {"status": "failed", "reason": str(error)}
        result["seconds"] = time.monotonic() - started
        if result["status"] == "done" and _diverged(result):
            result |= {"status": "diverged", "reason": "a loss or a score is not a number"}
        return result

    def read(self, run_id: str) -> Result | None:
        """The result that a run has left, of whatever status."""
        path = self.planner.root / "runs" / run_id / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _refuse_without_sources(self, run: Run) -> None:
        for needed in (run.anchor, run.origin.id if run.origin else None):
            if needed is not None and (self.read(needed) or FAILED)["status"] == "failed":
                raise RunError(f"{needed} failed, and this run needs it")

    def _model(self, run: Run, result: Result, tell: Tell) -> Path:
        """Train or make the run's model; the folder to score."""
        if run.task == "base":
            return Path(self.experiment.base_model)
        if run.task == "wise":
            return self._interpolate(run, tell)
        if run.task == "train" and run.origin is not None:
            run = self.planner.with_rate(run, self._rate_of_control(run))
        result["learning_rate"] = run.yaml.get("learning_rate")
        result["train"] = self._train(run, tell)
        return self.planner.out(run) / "out"

    def _train(self, run: Run, tell: Tell) -> dict[str, Any]:
        folder = self.planner.out(run)
        out = folder / "out"
        (folder / "train.yaml").write_text(yaml.safe_dump(dict(run.yaml), sort_keys=False))
        launch = [_beside_python(self.experiment.launch[0]), *self.experiment.launch[1:]]
        outcome = process.run(
            [*launch, str(folder / "train.yaml")], folder / "train.log", self.experiment.env,
            lambda: tell(process.step_of(out)),
        )  # fmt: skip
        if outcome.code != 0:
            raise RunError(f"training: {process.reason_of(folder / 'train.log')}")
        gpus = process.gpu_count(self.experiment.env)
        report = out / "daa_report.json"
        return {
            **asdict(outcome),
            "gpu_hours": outcome.seconds / 3600 * gpus,
            "report": json.loads(report.read_text()) if report.exists() else None,
            "history": _history(out),
        }

    def _score(self, run: Run, model: Path, tell: Tell) -> dict[str, Any]:
        folder = self.planner.out(run)
        adapter = (model / "adapter_config.json").is_file()
        job = {
            "model": self.experiment.base_model if adapter else str(model),
            "adapter": str(model) if adapter else None,
            "template": self.experiment.template,
            **self.experiment.score.model_dump(),
            "order_seed": run.seed if run.task == "base" else 0,
            "sets": [each.job(self.experiment.dataset_dir) for each in run.sets],
            "out": str(folder / "score.json"),
        }
        write_json(folder / "score_job.json", job)
        outcome = process.run(
            [sys.executable, "-m", "daa_ext.compare.score", str(folder / "score_job.json")],
            folder / "score.log", self.experiment.env, lambda: tell("scoring"),
        )  # fmt: skip
        if outcome.code != 0:
            raise RunError(f"scoring: {process.reason_of(folder / 'score.log')}")
        return json.loads((folder / "score.json").read_text())

    def _rate_of_control(self, run: Run) -> float:
        """The rate whose linear schedule has the mean of DAA's own eta_t / sqrt(c_t).

        A linear schedule from r over T steps has mean r (T + 1) / (2 T).
        """
        assert run.origin is not None
        made = self.read(run.origin.id)
        assert made is not None
        report = made["train"]["report"]
        steps = report["total_steps"]
        return float(f"{report['effective_lr_mean'] * 2 * steps / (steps + 1):.6g}")

    def _interpolate(self, run: Run, tell: Tell) -> Path:
        assert run.origin is not None
        assert run.alpha is not None
        tuned = self.planner.out(run.origin) / "out"
        target = self.planner.out(run) / "out"
        if not any(tuned.glob("*.safetensors")):  # made before this method was in the file
            self.planner.out(run.origin).mkdir(parents=True, exist_ok=True)
            self._train(run.origin, tell)
        shutil.rmtree(target, ignore_errors=True)
        try:
            interpolate(Path(self.experiment.base_model), tuned, run.alpha, target)
        except (ValueError, OSError) as error:
            raise RunError(f"interpolation: {error}") from error
        return target


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _history(out: Path) -> list[dict[str, Any]]:
    path = out / "trainer_state.json"
    return json.loads(path.read_text())["log_history"] if path.is_file() else []


def _diverged(result: Result) -> bool:
    losses = [row["loss"] for row in result.get("train", {}).get("history", []) if "loss" in row]
    sets = result.get("score", {}).get("sets", {}).values()
    return not all(map(math.isfinite, losses)) or any(each.get("diverged") for each in sets)


def _beside_python(command: str) -> str:
    """A console script of this environment, also where its bin folder is not on the PATH."""
    beside = Path(sys.executable).with_name(command)
    return str(beside) if beside.is_file() else command
