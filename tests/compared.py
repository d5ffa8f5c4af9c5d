"""A small experiment file, and a stand-in for the processes that a comparison starts.

The stand-in trains nothing: it writes what LLaMA-Factory and the scoring process would leave, so
that scheduling, resuming and reporting can be tested in milliseconds. The real thing is run by
tests/test_compare_real.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tiny import make_data

from daa_ext.compare.experiment import Experiment
from daa_ext.compare.process import Outcome
from daa_ext.compare.reading import read_experiment

LABELS = ["positive", "negative", "neutral"]


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """An experiment over the tiny data: two rates of direct, DAA with its control, WiSE-FT."""
    data = folder / "data"
    if not data.exists():
        make_data(data)
        rows = [
            {"question": "The market", "choices": ["rises", "falls apart"], "answer": i % 2,
             "style": "cont"}
            for i in range(6)
        ]  # fmt: skip
        (data / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    return {
        "output": str(folder / "out"),
        "base_model": str(base),
        "template": "default",
        "dataset_dir": str(data),
        "train": {
            "cutoff_len": 64, "per_device_train_batch_size": 8, "num_train_epochs": 1.0,
            "use_cpu": True,
        },
        "anchor": {"dataset": "general", "max_samples": 16},
        "domains": {
            "words": {
                "dataset": "domain",
                "max_samples": 16,
                "score": [
                    {"name": "words", "kind": "labels", "path": "domain_test.jsonl",
                     "labels": LABELS}
                ],
            }
        },
        "general": [
            {"name": "endings", "kind": "choice", "path": "choice.jsonl"},
            {"name": "repeat", "kind": "loss", "path": "general_test.jsonl"},
        ],
        "methods": {
            "direct": {"learning_rate": [1e-4, 1e-3]},
            "daa": {"learning_rate": [1e-4], "keys": {"daa_k0": 1}},
            "control": {"of": "daa"},
            "wise": {"of": "direct", "alpha": [0.5]},
        },
        "seeds": [1, 2],
        **changes,
    }  # fmt: skip


def experiment(folder: Path, *overrides: str, **changes: Any) -> Experiment:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content(folder, **changes), sort_keys=False))
    return read_experiment(path, overrides)


def outcome(code: int = 0, seconds: float = 10.0) -> Outcome:
    return Outcome(code, seconds, 1 << 20, None)


@dataclass
class FakeProcesses:
    """Stands in for process.run: `broken` runs fail, `diverged` ones score no number.

    right(run id) -> share of the domain's items that are right, and of the general ones.
    """

    root: Path
    right: Callable[[str], tuple[float, float]] = lambda run_id: (0.5, 0.5)
    broken: set[str] = field(default_factory=set)
    diverged: set[str] = field(default_factory=set)
    trained: list[str] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)

    def __call__(self, command: Sequence[str], log: Path, env: Any, watch: Any = None) -> Outcome:
        run_id = log.parent.relative_to(self.root / "runs").as_posix()
        if command[-1].endswith("train.yaml"):
            return self._train(run_id, Path(command[-1]), log)
        self._score(run_id, json.loads(Path(command[-1]).read_text()))
        return outcome()

    def _train(self, run_id: str, path: Path, log: Path) -> Outcome:
        self.trained.append(run_id)
        settings = yaml.safe_load(path.read_text())
        if run_id in self.broken:
            log.write_text("loading\nRuntimeError: out of memory\nTraceback ends\n")
            return outcome(1)
        out = Path(settings["output_dir"])
        out.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.zeros(2)}, out / "model.safetensors")
        history = [{"loss": 1.0, "step": 1}, {"eval_curve_repeat_loss": 2.0, "step": 1}]
        (out / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        if settings["finetuning_type"] == "daa":
            gradient = {"noise_scale": 3.0, "batch_norm": 2.0, "mean_norm": 1.0}
            report = {"total_steps": 4, "effective_lr_mean": 5e-4, "gradient": gradient}
            (out / "daa_report.json").write_text(json.dumps(report))
            step = {"step": 0, "similarity": 0.5}
            (out / "daa_steps.jsonl").write_text(json.dumps(step) + "\n")
        return outcome()

    def _score(self, run_id: str, job: dict[str, Any]) -> None:
        self.scored.append(run_id)
        domain, general = self.right(run_id)
        shares = {"labels": domain, "choice": general}
        sets = {each["name"]: self._set(each, shares.get(each["kind"])) for each in job["sets"]}
        if run_id in self.diverged:
            none = {"metrics": {"accuracy": None}, "items": [], "diverged": True}
            sets = {name: each | none for name, each in sets.items()}
        Path(job["out"]).write_text(
            json.dumps({"sets": sets, "seconds": 4.0, "versions": {"torch": "x"}})
        )

    def _set(self, each: dict[str, Any], share: float | None) -> dict[str, Any]:
        if share is None:
            items: list[dict[str, Any]] = [{"loss": 2.0, "tokens": 1}] * 4
            return {"kind": "loss", "n": 4, "metrics": {"loss": 2.0}, "items": items}
        # in pairs, so that both halves have the same share
        right = [i // 2 < share * 10 for i in range(20)]
        items = [{"truth": "a", "found": "a" if ok else "b"} for ok in right]
        metrics = {"accuracy": sum(right) / 20}
        return {"kind": each["kind"], "n": 20, "metrics": metrics, "items": items}
